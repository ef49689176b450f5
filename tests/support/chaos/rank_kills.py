"""kill -9, and a stop, of single ranks of a cluster under load: what its clients saw, what was left, how long it took.

strike      one rank of one worker, the leader or another, at a random moment under load
ended       its worker's processes are gone, all of them. A leader that is stopped cannot end itself: when the router
            has taken it for lost it is killed, as whoever keeps replicas does
back        the worker is started again at once, and is ready at the router as another incarnation
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import psutil
from diptych.v1 import cluster_pb2, generate_pb2

from tests.support.chaos.cases import AUTO, LOCAL, SPLIT, Answer, Case
from tests.support.chaos.clients import Attempt, Ledger
from tests.support.chaos.cluster import ChaosCluster
from tests.support.chaos.faults import Fault, Injected
from tests.support.process_tree import runs
from tests.support.prompts import reference_greedy, tokens_of
from tests.support.ranked_worker import ranks_of

HOWS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_STOPS = 0.25  # of all
_MOMENT_S = 3.0  # a strike comes within so long after the cluster is whole
_ENDS_S = 60.0
_GONE_S = 10.0  # the ranks, after the leader
_HIT_END_S = 120.0


@dataclass(frozen=True, slots=True)
class Strike:
    worker: str
    rank: int
    how: str
    after_s: float

    def __str__(self) -> str:
        return f"{self.how} rank {self.rank} of {self.worker}"


@dataclass(slots=True)
class Struck:
    """In seconds from the strike. `gap_s`: the longest wait of a client for its next token, or its first, that met the
    time until the worker served again; `hit_gap_s`: of those requests alone that were on the worker.
    """

    worker: str
    rank: int
    how: str
    running: int  # requests that were under way
    ended_s: float
    serves_s: float
    gap_s: float = 0.0
    hit_gap_s: float = 0.0  # of those whose worker it was
    left: list[str] = field(default_factory=list[str])


@dataclass
class RanksCluster(ChaosCluster):
    """`ranks`: of workers by their names. They begin as users begin them, unless they are forked."""

    ranks: Mapping[str, int] = field(default_factory=dict[str, int])

    def start_worker(self, role: str, worker_id: str, **transport: Any) -> None:
        config = self._worker_config(role, worker_id)
        config["worker"]["router_addresses"] = self.router_addresses()
        config["engine"]["tensor_parallel"] = self.ranks.get(worker_id, 1)
        config["transport"] |= transport
        self._spawn(worker_id, f"tests.support.{'ranked' if self.forked else 'paced'}_worker", config)

    def processes_of(self, worker: str) -> list[psutil.Process]:
        """Its ranks in their order."""
        leader = psutil.Process(self.processes.running[worker].pid)
        return [leader, *sorted(ranks_of(leader.pid), key=lambda p: p.pid)]


def cases_of(tokenizer: Any) -> list[Case]:
    """Every greedy one is compared with transformers; those with a seed with what was answered undisturbed."""

    def words(length: int, seed: int) -> tuple[int, ...]:
        return tuple(tokens_of(tokenizer, length, seed=seed))

    def params(max_tokens: int, **sampling: Any) -> generate_pb2.SamplingParams:
        return generate_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)

    sampled = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}
    return [
        Case("short", words(24, 1), params(40), AUTO),
        Case("short local", words(50, 2), params(60), LOCAL),
        Case("split", words(120, 3), params(40), SPLIT),
        Case("long split", words(400, 4), params(24), SPLIT),
        Case("long", words(300, 5), params(30), AUTO),
        Case("shared prefix", words(200, 6), params(30), AUTO, salt="shared"),
        Case("sampled", words(60, 7), params(40, seed=7, **sampled), AUTO),
        Case("sampled split", words(180, 8), params(30, seed=8, logprobs=1, **sampled), SPLIT),
    ]


def wrong_references(model: Path, cases: Sequence[Case], answers: Mapping[str, Answer]) -> list[str]:
    """Undisturbed greedy answers that are not those of transformers."""
    found = []
    for case in cases:
        if case.greedy:
            expected = reference_greedy(str(model), case.prompt, case.sampling.max_tokens)
            if list(answers[case.name].token_ids[: len(expected)]) != expected:
                found.append(f"undisturbed: {case.name}: {answers[case.name].token_ids} for {expected}")
    return found


def plan(seed: int, ranks: Mapping[str, int]) -> Iterator[Strike]:
    """Without end. Every rank of every worker comes once before any comes again."""
    rng = random.Random(f"ranks/{seed}")
    everyone = [(worker, rank) for worker, degree in sorted(ranks.items()) for rank in range(degree)]
    while True:
        for worker, rank in rng.sample(everyone, len(everyone)):
            how = "stop" if rng.random() < _STOPS else "kill"
            yield Strike(worker, rank, how, round(rng.uniform(0.0, _MOMENT_S), 2))


class Striker:
    """One strike at a time; nobody is struck before what the last one hit has ended, and the cluster is whole."""

    def __init__(self, cluster: RanksCluster, ledger: Ledger) -> None:
        self.cluster, self.ledger = cluster, ledger
        self.struck: list[Struck] = []
        self.injected: list[Injected] = []

    def run(self, strikes: Iterable[Strike], say: Callable[[str], None]) -> None:
        for strike in strikes:
            time.sleep(strike.after_s)
            one = self.strike(strike)
            say(
                f"{strike}: {one.running} under way, ended after {one.ended_s:.2f} s, serves again after "
                f"{one.serves_s:.1f} s, longest gap {one.gap_s:.2f} s{f', LEFT {one.left}' if one.left else ''}"
            )

    def strike(self, strike: Strike) -> Struck:
        cluster, name = self.cluster, strike.worker
        everybody = cluster.processes_of(name)
        hit = self.ledger.running()
        worker = cluster.processes.running.pop(name)  # its end is no surprise
        at, since = time.monotonic(), time.time_ns()
        everybody[strike.rank].send_signal(HOWS[strike.how])
        self.injected.append(Injected(Fault(f"{strike.how} {'rank' if strike.rank else 'leader'}", name), at, name))
        if strike.how == "stop" and not strike.rank:
            self._wait(lambda: not self._is_ready(name), f"{name}, which is stopped, is taken for lost")
            worker.kill()
        worker.wait(_ENDS_S)
        ended_s = time.monotonic() - at
        left = self._not_gone(everybody)
        cluster.start_again(name)
        cluster.wait_whole(180.0, {name: since})
        one = Struck(name, strike.rank, strike.how, len(hit), ended_s, time.monotonic() - at, left=left)
        deadline = time.monotonic() + _HIT_END_S
        while any(not a.outcome for a in hit) and time.monotonic() < deadline:
            time.sleep(0.05)
        until = at + one.serves_s
        one.gap_s = max((gap_s(a, at, until) for a in self.ledger.all()), default=0.0)
        one.hit_gap_s = max((gap_s(a, at, until) for a in hit if was_on(a, name)), default=0.0)
        self.struck.append(one)
        return one

    def _is_ready(self, name: str) -> bool:
        try:
            workers = self.cluster.seen_by(0).workers
        except grpc.RpcError:
            return True
        return any(w.worker_id == name and w.state == cluster_pb2.WORKER_STATE_READY for w in workers)

    @staticmethod
    def _wait(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _ENDS_S
        while not condition():
            assert time.monotonic() < deadline, f"not within {_ENDS_S:g} s: {what}"
            time.sleep(0.02)

    @staticmethod
    def _not_gone(processes: Sequence[psutil.Process]) -> list[str]:
        deadline = time.monotonic() + _GONE_S
        while (left := [p for p in processes if runs(p)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return [f"process {process.pid}" for process in left]


def was_on(attempt: Attempt, worker: str) -> bool:
    return attempt.route is not None and worker in (attempt.route.decode_worker, attempt.route.prefill_worker)


def gap_s(attempt: Attempt, since: float, until: float) -> float:
    """The longest that its client waited for the next token, or the first or the end, in a wait that met that time."""
    ended = attempt.ended or time.monotonic()
    events = [attempt.started, *attempt.arrivals, ended]
    met = [after - before for before, after in pairwise(events) if after > since and before < until]
    return max(met, default=0.0)


# What must not be left.


def dead_sockets(cluster: ChaosCluster, within_s: float = 15.0) -> list[str]:
    """TCP sockets of the cluster's processes whose other side has closed, and which they still hold."""
    deadline = time.monotonic() + within_s
    while (found := _half_closed(cluster)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _half_closed(cluster: ChaosCluster) -> list[str]:
    found = []
    for name, process in cluster.processes.running.items():
        with contextlib.suppress(psutil.Error):
            connections = psutil.Process(process.pid).net_connections("tcp")
            found += [f"{name}: {c.laddr} {c.raddr}" for c in connections if c.status == psutil.CONN_CLOSE_WAIT]
    return found


def as_rows(struck: Sequence[Struck]) -> list[dict[str, Any]]:
    return [{k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(one).items()} for one in struck]
