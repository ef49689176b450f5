"""The same cluster under Ray Serve: started here or joined, deployed declaratively, stopped without a trace."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import Literal

from deploy.clients import all_ready
from deploy.config import ClusterConfig
from deploy.last_words import useful_line
from deploy.model_check import ModelCheck
from deploy.progress import Stages
from deploy.ray_access import LOOPBACK, RayAccessError, for_joining, for_local
from settings import children
from settings.addresses import from_here, join
from settings.phases import UNKNOWN, waiting_for
from settings.processors import THREAD_VARIABLES, usable

_APP = "diptych"  # as deploy/kubernetes calls it
_WATCH_S = 0.1
_ABORT_S = 10.0  # for Serve in a cluster that was joined, when a start is given up
_LEFT_S = 3.0  # for processes of a Ray that was started here, after its own end


class ClusterStartError(Exception):
    """Names cause and fix."""


class RayCluster:
    """`check`: of the model, which goes on beside the start of Ray; nothing is deployed before its end."""

    import_path = "deploy.app:build"

    def __init__(self, config: ClusterConfig, check: ModelCheck | None = None) -> None:
        self.config = config
        self._check = check
        self.log_directory = ""
        self.serves = False
        self.target = join(from_here(config.router.host), config.router.grpc_port)
        self._started = False
        self._children_before: set[int] = set()

    def start(self, progress: Stages, timeout_s: float) -> None:
        """Returns when the router would answer. Raises ClusterStartError."""
        local = not self.config.ray.address
        progress("starting Ray" if local else f"joining Ray at {self.config.ray.address}")
        self._children_before = children.descendants()
        self._started = True
        self._init_ray(local, progress)
        import ray
        from ray import serve

        self.log_directory = _log_directory()
        progress.note(f"logs: {self.log_directory}")
        if self._check is not None:
            self._check.look()
        progress("starting Serve")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
        if self._check is not None:
            progress("checking the model")
            self._check.wait()
        progress("deploying router and workers")
        _forget_refusals()
        if _APP not in serve.status().applications:
            _forget_counts()
        self._deploy()
        deadline = time.monotonic() + timeout_s
        while True:
            status = serve.status().applications.get(_APP)
            state = status.status.value if status is not None else "NOT_STARTED"
            for who, why in _told(read="refusals").items():
                raise ClusterStartError(f"the {who} cannot start: {why}")
            if state in ("DEPLOY_FAILED", "UNHEALTHY"):
                why = "\n".join([*(d.message for d in status.deployments.values()), status.message]) if status else ""
                raise ClusterStartError(
                    f"Serve reports {state}: {useful_line(why) or 'no reason given'}\nlogs: {self.log_directory}"
                )
            if state == "RUNNING" and (not local or all_ready(self.config)):
                self.serves = True
                self._find_routers(progress)
                return
            if time.monotonic() > deadline:
                raise ClusterStartError(
                    f"not ready within {timeout_s:g} s (application {state}); raise --timeout, or see "
                    f"{self.log_directory}"
                )
            if not ray.is_initialized():
                raise ClusterStartError(f"Ray ended while the cluster was starting; see {self.log_directory}")
            progress.waiting(self._waited_for())
            time.sleep(_WATCH_S)

    def _find_routers(self, progress: Stages) -> None:
        """The one with the configured port comes first, where it is on this machine."""
        from deploy.directory import public_addresses

        with contextlib.suppress(Exception):
            found = public_addresses()
            if len(found) > 1:
                self.target = ",".join(sorted(found, key=lambda one: (one != self.target, one)))
                progress.note(f"routers: {self.target}")

    def _waited_for(self) -> str:
        """Replicas that Ray has not placed yet have said nothing."""
        phases = _told(read="phases")
        pools = {
            "router": self.config.router.replicas,
            **{role: pool.replicas for role, pool in self.config.pools.items()},
        }
        for name, wanted in pools.items():
            missing = wanted - sum(who.startswith(f"{name}-") for who in phases)
            if missing > 0:
                phases[f"{missing} {name}"] = UNKNOWN
        return waiting_for(phases)

    def _init_ray(self, local: bool, progress: Stages) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
        os.environ.setdefault("RAY_SERVE_ENABLE_SCALING_GATE", "0")
        # Ray runs its workers at niceness 15: whatever else is busy on the machine would stop our steps for seconds.
        os.environ.setdefault("RAY_worker_niceness", "0")
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        environment = {"env_vars": {**THREAD_VARIABLES, "RAY_SERVE_LOG_TO_STDERR": "0"}}
        root = str(Path(__file__).resolve().parents[1])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        try:
            if local:
                where = {
                    "object_store_memory": self.config.ray.object_store_bytes,
                    "num_cpus": usable(),  # Ray counts the machine's, and starts as many processes
                    **for_local(self.config.ray),
                }
                progress.note(f"logs: below {where['_temp_dir']}")
            else:
                where = for_joining(self.config.ray)
        except RayAccessError as error:
            raise ClusterStartError(str(error)) from None
        import ray

        try:
            ray.init(namespace="diptych", runtime_env=environment, **where, **quiet)
        except Exception as error:
            raise ClusterStartError(f"Ray did not start: {error}") from error
        address = ray.util.get_node_ip_address()
        if local and address != LOOPBACK:
            ray.shutdown()
            raise ClusterStartError(
                f"Ray uses the address {address} instead of {LOOPBACK}: its ports would be "
                "open to the network. This version of Ray is not known here; use the one in requirements/base.txt"
            )

    def _deploy(self) -> None:
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        schema = ServeDeploySchema.model_validate(
            {
                "proxy_location": "Disabled",
                "applications": [
                    {
                        "name": _APP,
                        "import_path": self.import_path,
                        "route_prefix": None,
                        "external_scaler_enabled": self.config.scaling.resizes,
                        "args": self.config.model_dump(mode="json"),
                    }
                ],
            }
        )
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(schema, _blocking=False)

    def stop(self) -> None:
        """Drains, shuts Serve down, and Ray if it was started here. What has not served anybody is not drained."""
        if not self._started:
            return
        self._started = False
        local = not self.config.ray.address
        ours = children.descendants() - self._children_before if local else set()
        # Ray tells its driver of every actor that ends, the ones that it is asked to end included.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            if self.serves:
                _shut_down_serve()
            elif not local:
                shutdown = threading.Thread(target=_shut_down_serve, name="serve-shutdown", daemon=True)
                shutdown.start()
                shutdown.join(_ABORT_S)  # its controller goes on without us
            with contextlib.suppress(Exception):  # it may have got no further than half an import
                import ray

                ray.shutdown()
        children.end(ours, _LEFT_S)


def _log_directory() -> str:
    from ray._private.worker import global_worker

    with contextlib.suppress(Exception):
        node = global_worker.node
        if node is not None:
            return str(Path(node.get_session_dir_path()) / "logs" / "serve")
    return "Ray's session directory"


def _shut_down_serve() -> None:
    from ray import serve

    with contextlib.suppress(Exception):
        serve.shutdown()


def _told(read: Literal["refusals", "phases"]) -> dict[str, str]:
    """By the replicas, to the directory."""
    from deploy import directory

    try:
        return directory.read_refusals() if read == "refusals" else directory.read_phases()
    except Exception:  # Ray is busy, or gone: the loop finds out
        return {}


def _forget_refusals() -> None:
    """Of an earlier cluster in the Ray that is joined."""
    from deploy.directory import forget_refusals

    with contextlib.suppress(Exception):
        forget_refusals()


def _forget_counts() -> None:
    """Of an application that was here before."""
    from deploy.directory import keep
    from deploy.serve_platform import COUNTS

    with contextlib.suppress(Exception):
        keep(COUNTS, "")
