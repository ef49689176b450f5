"""A cluster under Ray Serve that the scaling policy resizes, under load: `python -m tests.support.scaled --directory D
--model M`. Exit code 0, or a traceback that says what was wrong.

    answers    thirty long answers at once: the decode pool grows to three, the prefill pool stays at one
    fewer      six go on: the decode pool shrinks to one; what runs on those that leave migrates
    prompts    long prompts, short answers beside them: the prefill pool grows
    fewer      the prefill pool shrinks to one
    nothing    after a while there are no workers; the next request waits for them, and is answered
    by hand    `diptych scale` asks for a decode worker that has to start; and for more than the budget has

Every answer is compared with what plain transformers says; none may fail. Steps are paced and KV memory is small, so
that the load is the same on any machine. (So small that a handoff may find no room in time, which is a recovery.)

With --hosts, on several: a Ray node in each network namespace, KV over TCP between them, and one of them cut off and
healed while the prompts come.

With --few-places, where there is no place for one of the workers that the answers need: it is withdrawn and said so,
the others go on, and a node that comes later gets it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from diptych.v1 import cluster_pb2, generate_pb2, generate_pb2_grpc
from rich.console import Console

from deploy.clients import ROLE_NAMES, RequestFailed, get_cluster, get_scaling
from deploy.config import ClusterConfig
from deploy.progress import Stages
from deploy.ray_cluster import RayCluster
from deploy.scaling_view import line
from settings.addresses import host_of
from settings.file import validate_settings
from tests.support.netns import Hosts
from tests.support.processes import Reply, free_port
from tests.support.prompts import reference_greedy, tokens_of
from tests.support.ray_nodes import HOSTS, FewPlaces, Nodes, started

PACE = "40 2"  # ms a step and a token: about 450 prompt tokens a second
ENGINE = {"num_blocks": 64, "max_batch_tokens": 256}
ITL_TARGET_MS = 400.0  # never reached: memory is what there is too little of
BUDGET = 4
SCALING = {
    "budget_gpus": BUDGET,
    "interval_s": 1.0,
    "start_s": 10.0,
    "window_s": 20.0,
    "warm_up_s": 1.0,
    "hold_s": 5.0,
    "unschedulable_after_s": 120.0,
    "idle_s": 20.0,
}
ANSWER_S = 120.0
PATIENCE_S = 240.0  # for a worker to start on a busy machine; a quiet one needs ten
CUT_S = 8.0
PLACES = 3
NO_PLACE_S, RETRY_S = 30.0, 20.0  # a place that there is must be had within the first, on a busy machine, too
Question = tuple[generate_pb2.GenerateRequest, list[int]]


class PacedCluster(RayCluster):
    import_path = "tests.support.paced_app:build"


def settings_of(model: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes`: of whole sections' keys."""
    settings: dict[str, Any] = {
        "model": str(model),
        "engine": {**ENGINE, "dtype": "float32", "threads": 1},
        "transport": {"ucx_net_devices": "lo", "digest": True},
        "worker": {"drain_s": 20},
        "router": {
            "itl_target_ms": ITL_TARGET_MS,
            "grpc_port": free_port(),
            "internal_port": free_port(),
            "http_port": None,
        },
        "telemetry": {"metrics_port": None, "worker_metrics_port": None},
        "scaling": SCALING,
    }
    for section, keys in changes.items():
        settings[section] = {**settings.get(section, {}), **keys}
    return settings


class Asked:
    """With what is expected, so made before there is a cluster: on a busy machine it takes longer than `idle_s`."""

    def __init__(self, model: Path) -> None:
        self.answers = questions(model, 40, 200, range(6))
        self.prompts = questions(model, 400, 6, range(10, 16))
        self.short = questions(model, 40, 60, range(3))


def questions(model: Path, prompt_tokens: int, answer_tokens: int, seeds: Sequence[int]) -> list[Question]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for seed in seeds:
        prompt = tokens_of(tokenizer, prompt_tokens, seed=seed)
        request = generate_pb2.GenerateRequest(
            token_ids=generate_pb2.TokenIds(ids=prompt),
            sampling=generate_pb2.SamplingParams(max_tokens=answer_tokens, ignore_eos=True),
        )
        found.append((request, reference_greedy(str(model), prompt, answer_tokens)))
    return found


class Load:
    """So many clients ask for ever. Every answer is compared, every error kept."""

    def __init__(self, target: str, asked: Sequence[Question], clients: int) -> None:
        self._asked, self._stopping = asked, threading.Event()
        self.complete = self.recovered = 0
        self.problems: list[str] = []
        self._lock = threading.Lock()
        self._channel = grpc.insecure_channel(target)
        self._stub = generate_pb2_grpc.GenerateServiceStub(self._channel)
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        count = 0
        while not self._stopping.is_set():
            question, expected = self._asked[(count + number) % len(self._asked)]
            count += 1
            request = generate_pb2.GenerateRequest()
            request.CopyFrom(question)
            request.cache_salt = f"{id(self)}/{number}/{count}"  # nothing is answered from a cache
            reply = Reply()
            try:
                for response in self._stub.Generate(request, timeout=ANSWER_S):
                    reply.take(response)
                wrong = "" if reply.token_ids == expected else f"{reply.token_ids} where {expected} was due"
            except grpc.RpcError as error:
                wrong = f"{error.code().name} {error.details()}"  # type: ignore[attr-defined]
                self._stopping.wait(0.5)
            with self._lock:
                if wrong:
                    self.problems.append(wrong)
                    continue
                self.complete += 1
                self.recovered += bool(reply.finished.recoveries)

    def end(self) -> None:
        """Waits for the answers that are under way."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(ANSWER_S + 5)

    def check(self) -> None:
        self._channel.close()
        hang = sum(thread.is_alive() for thread in self._threads)
        assert not hang, f"{hang} clients hang"
        assert not self.problems, f"{len(self.problems)} answers failed: {self.problems[:5]}"


class Look:
    """What the router says, and how the pools went."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target)
        self.begun = time.monotonic()
        self.went: list[tuple[float, int, int, int]] = []
        self.most = 0  # workers at once, whatever they do
        self.moved: set[tuple[str, str]] = set()

    def cluster(self) -> cluster_pb2.Cluster:
        return get_cluster(self._channel, 10.0)

    def pools(self) -> tuple[int, int]:
        """Of ready workers."""
        seen = self.cluster()
        self.moved |= {(m.request_id, m.target_worker) for m in seen.migrations if m.outcome == "done"}
        workers = seen.workers
        ready = [ROLE_NAMES[w.role] for w in workers if w.state == cluster_pb2.WORKER_STATE_READY]
        there = [w for w in workers if w.state in (cluster_pb2.WORKER_STATE_READY, cluster_pb2.WORKER_STATE_DRAINING)]
        self.most = max(self.most, len(there))
        row = ready.count("prefill"), ready.count("decode"), ready.count("standby")
        if not self.went or self.went[-1][1:] != row:
            self.went.append((round(time.monotonic() - self.begun, 1), *row))
            print("pools", self.went[-1], flush=True)
        return row[:2]

    def until(self, condition: Callable[[tuple[int, int]], bool], what: str) -> float:
        begun = time.monotonic()
        while not self._holds(condition):
            if time.monotonic() > begun + PATIENCE_S:
                told = "\n".join(line(d) for d in get_scaling(self._channel, 40).decisions)
                raise AssertionError(f"not within {PATIENCE_S:g} s: {what}; {self.went}\n{told}")
            time.sleep(0.2)
        return round(time.monotonic() - begun, 1)

    def rests(self) -> bool:
        """One worker each, and no other."""
        self.pools()
        return self.went[-1][1:] == (1, 1, 0)

    def left(self) -> list[str]:
        """Workers that hold blocks of somebody."""
        workers = self.cluster().workers
        return [w.worker_id for w in workers if w.load.free_blocks != w.load.total_blocks or w.load.leased_blocks]

    def decider(self) -> str:
        return get_scaling(self._channel, 1).current.decider

    def decisions(self) -> dict[str, int]:
        """How often each rule has changed something, as the router shows it."""
        told = get_scaling(self._channel, 128, changes_only=True).decisions
        assert told, "no decision has reached the router"
        return dict(Counter(d.rule for d in told))

    def _holds(self, condition: Callable[[tuple[int, int]], bool]) -> bool:
        try:
            return condition(self.pools())
        except RequestFailed:  # a busy machine
            return False


class Cut:
    """The host of a prefill worker, off from everybody for a while; the pools are whole again afterwards."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts

    def __call__(self, look: Look) -> None:
        workers = look.cluster().workers
        on = {name: [w for w in workers if host_of(w.address) == a] for name, a in self._hosts.addresses.items()}
        # Not the one with the only decode worker: without any, requests end with an error after a while.
        name = next(n for n, ws in on.items() if ws and all(w.role == cluster_pb2.ROLE_PREFILL for w in ws))
        there = [w.worker_id for w in on[name]]
        print(f"cut: host {name} with {there}", flush=True)
        before = look.pools()
        self._hosts.unplug(name)
        try:
            look.until(lambda _: self._lost(look, there), "its workers are lost")
            time.sleep(CUT_S)
        finally:
            self._hosts.plug(name)
        look.until(lambda pools: sum(pools) >= sum(before), "its workers are back")

    def _lost(self, look: Look, names: Sequence[str]) -> bool:
        ready = [w.worker_id for w in look.cluster().workers if w.state == cluster_pb2.WORKER_STATE_READY]
        return not set(names) & set(ready)


def run(target: str, asked: Asked, cut: Callable[[Look], None] | None) -> dict[str, Any]:
    """The loads, on a cluster of one prefill and one decode worker. `cut`: what happens to the hosts under prompts."""
    answers, prompts = asked.answers, asked.prompts
    look, took = Look(target), {}
    look.until(lambda pools: pools == (1, 1), "one worker each")
    with contextlib.ExitStack() as ends:
        few = Load(target, answers, 6)
        ends.callback(few.end)
        many = Load(target, answers, 26)
        ends.callback(many.end)
        took["decode pool 1 to 3"] = look.until(lambda pools: pools == (1, 3), "three decode workers")
        many.end()
        took["decode pool 3 to 1"] = look.until(lambda _: look.rests(), "one decode worker, six answers at a time")
        moved = len(look.moved)
        long = Load(target, prompts, 16)
        ends.callback(long.end)
        # How many of the budget's four is the policy's choice: prompts run on idle decode workers as well.
        took["prefill pool grows"] = look.until(lambda pools: pools[0] > 1 and sum(pools) == BUDGET, "prefill workers")
        if cut is not None:
            cut(look)
        long.end()
        took["prefill pool to 1"] = look.until(lambda _: look.rests(), "one prefill worker")
    loads = few, many, long
    for load in loads:
        load.check()
    assert look.most <= BUDGET, f"{look.most} workers at once: {look.went}"
    look.until(lambda _: not look.left(), "nothing left")
    told = look.decisions()
    took["to zero"] = look.until(lambda _: look.went[-1][1:] == (0, 0, 0), "nobody, since nobody asks")
    begun = time.monotonic()
    first = Load(target, answers, 1)
    look.until(lambda pools: pools == (1, 1), "the first request brings them back")
    first.end()
    first.check()
    took["back, and an answer"] = round(time.monotonic() - begun, 1)
    by_hand(target, look)
    return {
        "took_s": took,
        "complete": sum(load.complete for load in loads),
        "migrated_when_the_decode_pool_shrank": moved,
        "recovered": {"few": few.recovered, "many": many.recovered, "prompts": long.recovered},
        "most_workers": look.most,
        "went": look.went,
        "rules": told,
    }


def run_with_few_places(target: str, asked: Asked, nodes: FewPlaces) -> dict[str, Any]:
    look, took = Look(target), {}
    look.until(lambda pools: pools == (1, 1), "one worker each")
    with contextlib.ExitStack() as ends:
        load = Load(target, asked.answers, 32)
        ends.callback(load.end)
        look.until(lambda pools: pools == (1, 2), "as many decode workers as there are places")
        took["withdrawn"] = look.until(lambda _: "withdrawn" in look.decisions(), "what finds no place is withdrawn")
        without = load.complete
        look.until(lambda _: load.complete > without + 20, "answers go on")
        assert look.pools() == (1, 2), look.went
        nodes.more(2)
        took["placed"] = look.until(lambda pools: pools == (1, 3), "the node that came gets the third decode worker")
    load.check()
    assert look.most <= BUDGET, f"{look.most} workers at once: {look.went}"
    look.until(lambda _: not look.left(), "nothing left")
    return {
        "took_s": took,
        "complete": load.complete,
        "without_a_place": load.complete - without,
        "went": look.went,
        "rules": look.decisions(),
    }


def by_hand(target: str, look: Look) -> None:
    done = scale_to(target, "decode=2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ready"] == {"prefill": 1, "decode": 2, "standby": 0}, done.stdout
    assert look.pools() == (1, 2)
    done = scale_to(target, "prefill=9")
    assert done.returncode == 1
    assert "goes for prefill=" in done.stderr
    assert f"a budget of {BUDGET} GPUs" in done.stderr, done.stderr


def scale_to(target: str, counts: str) -> subprocess.CompletedProcess[str]:
    diptych = str(Path(sys.executable).parent / "diptych")
    command = [diptych, "scale", counts, "--target", target, "--timeout", str(PATIENCE_S), "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S + 30, check=False)


def scaler_dies(target: str, asked: Asked) -> float:
    """kill -9. Serve starts another one, which begins with what it finds; answers go on. Seconds until it decides."""
    with contextlib.ExitStack() as ends:
        look, load = Look(target), Load(target, asked.short, 2)
        ends.callback(load.end)
        before = look.decider()
        os.kill(int(before.rpartition(" ")[2]), signal.SIGKILL)  # "..., process 4711"
        took_s = look.until(lambda _: look.decider() != before, "another scaler decides")
        assert min(look.pools()) >= 1, look.went
    load.check()
    assert load.complete, "no answer"
    return took_s


def scaler_log(directory: str) -> str:
    """What the scaler did, for whoever reads of a failure."""
    lines: list[str] = []
    for path in Path(directory).rglob("replica_*_Scaler_*.log") if directory else ():
        lines += [line for line in path.read_text(errors="replace").splitlines() if "scaling:" in line]
    return "\n".join(lines)[-8000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--few-places", action="store_true")
    parser.add_argument("--hosts", type=int, help="process id of who made the namespaces; runs in the hub")
    arguments = parser.parse_args()
    os.environ["PACE"] = PACE
    asked = Asked(arguments.model)
    with contextlib.ExitStack() as stack:
        nodes: Nodes | FewPlaces | None = None
        changes: dict[str, Any] = {}
        if arguments.hosts:
            hosts = Hosts.made_by(arguments.hosts, HOSTS)
            nodes = stack.enter_context(started(lambda at: Nodes(hosts, at), arguments.directory))
            changes = nodes.settings()
        elif arguments.few_places:
            nodes = stack.enter_context(started(lambda at: FewPlaces(at, PLACES), arguments.directory))
            changes = nodes.settings() | {"scaling": {"unschedulable_after_s": NO_PLACE_S, "retry_s": RETRY_S}}
        config = validate_settings(settings_of(arguments.model, changes), ClusterConfig, "test")
        cluster = PacedCluster(config)
        try:
            cluster.start(Stages(Console()), PATIENCE_S)
            if isinstance(nodes, FewPlaces):
                found = run_with_few_places(cluster.target, asked, nodes)
            else:
                found = run(cluster.target, asked, Cut(nodes.hosts) if nodes is not None else None)
            if nodes is None:
                found["took_s"]["another scaler"] = scaler_dies(cluster.target, asked)
            (arguments.directory / "found.json").write_text(json.dumps(found))
            print(json.dumps(found), flush=True)
        except BaseException:
            traceback.print_exc()  # now: a process may not survive the end of Ray
            raise
        finally:
            print(scaler_log(str(nodes.directory) if nodes is not None else cluster.log_directory), flush=True)
            cluster.stop()


if __name__ == "__main__":
    main()
