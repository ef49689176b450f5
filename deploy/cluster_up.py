"""Starting and stopping a cluster for `diptych up`, `make demo` and whoever else wants one for a while."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy.alike import cannot_share_kv, started
from deploy.clients import all_ready
from deploy.config import ClusterConfig, shared_out_here
from deploy.model_check import ModelCheckError, check_files, checking
from deploy.pools import too_few_gpus
from deploy.processes import Processes
from deploy.progress import Stages
from deploy.ray_cluster import ClusterStartError, RayCluster
from engine.native.processors import numbers
from router.server import exposures
from settings.addresses import cannot_listen, listening_socket
from settings.model_path import ModelPathError, pinned_model
from settings.phases import waiting_for
from settings.process import DIES_WITH
from settings.processors import THREAD_VARIABLES
from settings.telemetry.setup import check_telemetry
from settings.tls import TlsError, Wiring

MODULES = {"prefill": "prefill_worker", "decode": "decode_worker", "standby": "elastic_worker"}
_ABORT_S = 5.0  # to leave, for processes that have not served anybody


def check_before_start(config: ClusterConfig) -> None:
    """What can be known to fail, before anything runs. Raises ClusterStartError."""
    try:
        check_files(config)
    except ModelCheckError as error:
        raise ClusterStartError(str(error)) from None
    check_security(config)
    check_telemetry(config.telemetry)
    for host_key, key, host, port in (
        ("router.host", "router.grpc_port (or --grpc-port)", config.router.host, config.router.grpc_port),
        ("router.host", "router.http_port (or --http-port)", config.router.host, config.router.http_port),
        (
            "router.internal_host",
            "router.internal_port (or --internal-port)",
            config.router.internal_host,
            config.router.internal_port,
        ),
        (
            "telemetry.metrics_host",
            "telemetry.metrics_port",
            config.telemetry.metrics_host,
            config.telemetry.metrics_port or 0,
        ),
    ):
        if port is None:
            continue
        try:
            listening_socket(host, port).close()
        except OSError as error:
            raise ClusterStartError(cannot_listen(host, port, host_key, key, error)) from None
    ports = {"grpc_port": config.router.grpc_port, "http_port": config.router.http_port}
    ports["internal_port"] = config.router.internal_port
    for (one, port), (other, same) in itertools.combinations(ports.items(), 2):
        if port == same and port:
            raise ClusterStartError(f"router.{one} and router.{other} are both {port}; give them different ports")
    if config.decode.replicas < 1:
        raise ClusterStartError("decode.replicas is 0, and nothing works without a decode worker; set at least 1")
    check_processors(config)


def pinned(config: ClusterConfig) -> ClusterConfig:
    """With a model that is the same for every process, whatever its directory and whenever it starts. Raises
    ClusterStartError.
    """
    try:
        return config.model_copy(update={"model": pinned_model(config.model)})
    except ModelPathError as error:
        if config.ray.address:  # its nodes may have what this machine has not
            return config
        raise ClusterStartError(str(error)) from None


def check_security(config: ClusterConfig) -> None:
    """Nothing is open to strangers by accident, and the files of `security:` can be used. Raises ClusterStartError."""
    hosts = {config.settings_of(group).worker.host for group in config.groups}
    problems = config.security.exposed(
        [*exposures(config.router, config.telemetry), *(("worker.host", host, "internal") for host in sorted(hosts))]
    )
    if problems:
        raise ClusterStartError("\n".join(problems))
    try:
        Wiring(config.security, "router")
        Wiring(config.security, "worker")
    except TlsError as error:
        raise ClusterStartError(str(error)) from None


def check_pools_match(config: ClusterConfig) -> None:
    """KV is handed over between equal layouts only. Raises ClusterStartError, or SettingsError for a bad override."""
    problem = cannot_share_kv(config, started(config))
    if problem:
        raise ClusterStartError(problem)


def check_reserved_gpus(config: ClusterConfig) -> None:
    """Ray gives every rank a device. Raises ClusterStartError."""
    for group in config.groups:
        engine = config.settings_of(group).engine
        problem = too_few_gpus(group, engine.tensor_parallel, engine.device) if group.replicas else None
        if problem:
            raise ClusterStartError(problem)


def check_processors(config: ClusterConfig) -> None:
    """No processor has threads of two workers of this machine bound to it. Raises ClusterStartError."""
    owners: dict[int, str] = {}
    for group in config.groups:
        named = numbers(config.settings_of(group).engine.pin_threads)
        for worker in (f"{group.title}-{i}" for i in range(group.replicas)):
            for processor in named:
                if processor in owners:
                    raise ClusterStartError(
                        f"engine.pin_threads binds threads of {owners[processor]} and of {worker} to processor "
                        f"{processor}; use auto, or give each pool or group its own (decode.engine, "
                        "decode.groups.NAME.engine), with one replica each"
                    )
                owners[processor] = worker


@contextlib.contextmanager
def running_cluster(
    config: ClusterConfig, *, use_ray: bool, say: Stages, timeout_s: float
) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Yields the routers' addresses when they answer ("a:8100,b:8110"), and who tells of processes that ended
    since the last look.

    Stops everything at the end, however it comes.
    """
    if config.scaling.resizes and not use_ray:
        raise ClusterStartError(
            "scaling.dry_run is false, and only a cluster under Ray Serve is resized; use --ray, or set "
            "scaling.dry_run to true and watch `diptych scaling`"
        )
    check_pools_match(config)
    if use_ray:
        check_reserved_gpus(config)
    config = pinned(config)
    if not config.ray.address:
        config = shared_out_here(config)
        check_before_start(config)
    start = _ray_cluster if use_ray else _plain_processes
    with start(config, say, timeout_s) as running:
        yield running


@contextlib.contextmanager
def _ray_cluster(config: ClusterConfig, say: Stages, timeout_s: float) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    with contextlib.ExitStack() as stack:
        check = None if config.ray.address else stack.enter_context(checking(config))
        cluster = RayCluster(config, check)
        try:
            cluster.start(say, timeout_s)
            stack.close()
            yield cluster.target, list  # Serve replaces what ends
        except ModelCheckError as error:
            raise ClusterStartError(str(error)) from None
        finally:
            say.ending("stopping: drain, Serve, Ray" if cluster.serves else "stopping Ray")
            cluster.stop()


@contextlib.contextmanager
def _plain_processes(
    config: ClusterConfig, say: Stages, timeout_s: float
) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    try:
        directory = Path(tempfile.mkdtemp(prefix="diptych-"))
    except OSError as error:
        raise ClusterStartError(
            f"no directory for logs: {error.strerror}; set TMPDIR to one that can be written"
        ) from None
    processes = Processes(directory, {**THREAD_VARIABLES, DIES_WITH: str(os.getpid())})
    told: set[str] = set()
    serves = False

    def problems() -> list[str]:
        new = {name: code for name, code in processes.ended().items() if name not in told}
        told.update(new)
        return [
            f"{name} ended with code {code} and will not be restarted; see {directory}/{name}.log"
            for name, code in new.items()
        ]

    routers = config.router_places()
    try:
        say.note(f"logs: {directory}")
        for one in routers[1:]:
            say.note(one.describe())
        say("starting processes")
        security = config.security.model_dump(mode="json")
        for one in routers:
            router_settings = {
                "router": one.router.model_dump(mode="json"),
                "security": security,
                "telemetry": one.telemetry.model_dump(mode="json"),
                "logging": config.logging.model_dump(mode="json"),
            }
            processes.spawn(one.name, "router", router_settings)
        for group in config.groups:
            for i in range(group.replicas):
                settings = config.settings_of(group).model_dump(mode="json")
                settings["worker"] |= {
                    "worker_id": f"{group.title}-{i}",
                    "router_addresses": [one.internal for one in routers],
                }
                processes.spawn(f"{group.title}-{i}", MODULES[group.role], settings)
        deadline = time.monotonic() + timeout_s
        while not all(all_ready(config, one.internal) for one in routers):
            for name, code in processes.ended().items():
                raise ClusterStartError(f"{name} ended with code {code}: {processes.last_words(name)}")
            if time.monotonic() > deadline:
                said = "; ".join(f"{name}: {processes.last_words(name)}" for name in processes.running)
                raise ClusterStartError(
                    f"not ready within {timeout_s:g} s. Last words: {said}. Logs are in {directory}"
                )
            say.waiting(waiting_for(processes.phases()))
            time.sleep(0.1)
        serves = True
        yield ",".join(one.target for one in routers), problems
    finally:
        say.ending("stopping processes")
        stuck = processes.stop(config.worker.drain_s + config.router.drain_s if serves else _ABORT_S)
        if stuck:
            say(f"had to kill {', '.join(stuck)}; see the logs in {directory}")
        elif sys.exc_info()[0] in (None, KeyboardInterrupt) and not told:
            shutil.rmtree(directory, ignore_errors=True)  # a clean end: nobody needs the logs
