"""What an operator does to a cluster under load, and how far moves of running answers were when a fault hit."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from diptych.v1 import admin_pb2, admin_pb2_grpc, cluster_pb2

from tests.support.chaos.clients import Attempt, Ledger
from tests.support.chaos.cluster import ChaosCluster

ROLES = {"prefill": cluster_pb2.ROLE_PREFILL, "decode": cluster_pb2.ROLE_DECODE, "standby": cluster_pb2.ROLE_STANDBY}
PULLING, HANDING_OVER, ADOPTED = "pulling", "handing over", "adopted"
PHASES = (PULLING, HANDING_OVER, ADOPTED)
_SAME_S = 0.2  # two looks at one migration differ by less about when it began
_BOUND_S = 60.0
_PASSES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True)
class Seen:
    """A migration as a router tells of it. `began`: on our clock."""

    router: int
    said: Any
    began: float

    @property
    def is_open(self) -> bool:
        """Or its first token at the target has not come."""
        return self.said.outcome == "under way" or (self.said.outcome == "done" and not self.said.HasField("pause_ms"))

    def phase(self, at: float) -> str:
        """Empty: it had not begun, or its first token at the target had come."""
        said, ms = self.said, (at - self.began) * 1e3
        if ms < 0:
            return ""
        if said.outcome == "done" and ms >= said.took_ms:
            # The pause begins with the source's last token, and that comes after the word to hand over.
            return "" if said.HasField("pause_ms") and ms > said.frozen_ms + said.pause_ms else ADOPTED
        return HANDING_OVER if said.frozen_ms and ms >= said.frozen_ms else PULLING

    def is_same(self, other: Seen) -> bool:
        mine, theirs = self.said, other.said
        same = (self.router, mine.request_id, mine.source_worker) == (
            other.router, theirs.request_id, theirs.source_worker,
        )  # fmt: skip
        return same and mine.target_worker == theirs.target_worker and abs(self.began - other.began) < _SAME_S


def migrations(cluster: ChaosCluster, router: int) -> list[Seen]:
    asked = time.monotonic()
    try:
        state = cluster.seen_by(router)
    except grpc.RpcError:
        return []
    now = (asked + time.monotonic()) / 2
    return [Seen(router, m, now - m.age_ms / 1e3) for m in state.migrations]


def all_migrations(cluster: ChaosCluster) -> list[Seen]:
    return [seen for router in range(cluster.routers) for seen in migrations(cluster, router)]


def phases(before: list[Seen], after: list[Seen], victim: str, at: float) -> list[str]:
    """Of each move that was open when `victim` was hit: what the victim was to it, and its phase then.

    A look takes as long as a phase: what the routers told later says how far a move was.
    """
    found = []
    for seen in before:
        if not seen.is_open:
            continue
        phase = next((s for s in after if s.is_same(seen)), seen).phase(at)
        said = seen.said
        part = {said.source_worker: "source", said.target_worker: "target"}.get(victim, "others")
        if phase:
            found.append(f"{part}: {phase}")
    return found


class Operator:
    """By the commands of `diptych switch`, `drain` and `migrate`, asked of any router."""

    def __init__(self, cluster: ChaosCluster, ledger: Ledger) -> None:
        self.cluster, self.ledger = cluster, ledger

    def _admin(self, router: int) -> Any:
        return admin_pb2_grpc.AdminServiceStub(self.cluster.channels[router])

    def switch(self, worker: str, role: str, router: int) -> None:
        request = admin_pb2.SwitchRoleRequest(worker_id=worker, role=ROLES[role])
        self._repeated(lambda: self._admin(router).SwitchRole(request, timeout=20.0))
        self.wait_role(worker, role)

    @staticmethod
    def _repeated(call: Callable[[], Any]) -> Any:
        """A machine so busy that streams break for a moment is told to try again."""
        deadline = time.monotonic() + _BOUND_S
        while True:
            try:
                return call()
            except grpc.RpcError as error:
                if error.code() not in _PASSES or time.monotonic() > deadline:  # type: ignore[attr-defined]
                    raise
                time.sleep(0.5)

    def wait_role(self, worker: str, role: str) -> None:
        """Every router sends it that."""

        def told() -> bool:
            states = [self.cluster.seen_by(i) for i in range(self.cluster.routers)]
            return all(w.role == ROLES[role] for s in states for w in s.workers if w.worker_id == worker)

        self.cluster.wait_until(told, 20.0, f"{worker} as {role} at every router")

    def drain(self, worker: str, router: int) -> Any:
        """To standby; when nothing is left on it, of any router."""
        request = admin_pb2.DrainWorkerRequest(worker_id=worker)
        (*_, last) = self._repeated(lambda: list(self._admin(router).DrainWorker(request, timeout=_BOUND_S)))
        assert last.done, last
        return last

    def migrate(self, attempt: Attempt, target: str) -> str:
        """What became of it."""
        request = admin_pb2.MigrateRequest(request_id=attempt.request_id, target_worker=target)
        try:
            return self._admin(attempt.router).Migrate(request, timeout=_BOUND_S).migration.outcome
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"  # type: ignore[attr-defined]

    def long_ones(self, rng: random.Random, least_left: int = 50) -> list[Attempt]:
        """Answers that run and have some way to go, in random order."""
        running = [
            a
            for a in self.ledger.running()
            if a.request_id and 4 <= len(a.token_ids) <= a.case.sampling.max_tokens - least_left
        ]
        return rng.sample(running, len(running))

    def migrate_some(self, rng: random.Random, count: int = 4) -> list[str]:
        """At once, each to a random worker. What became of each."""
        decodes = [name for name in self.cluster.workers if name.startswith("decode")]
        outcomes: list[str] = []

        def move(attempt: Attempt, target: str) -> None:
            outcomes.append(self.migrate(attempt, target))

        threads = [
            threading.Thread(target=move, args=(attempt, rng.choice(decodes)), daemon=True)
            for attempt in self.long_ones(rng)[:count]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_BOUND_S)
        return outcomes

    def under_way(self, rng: random.Random, phase: str, within_s: float = 15.0) -> Seen | None:
        """Begins moves until one is seen in this phase; None: none was in time."""
        decodes = [name for name in self.cluster.workers if name.startswith("decode")]
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            attempt = next(iter(self.long_ones(rng)), None)
            if attempt is None:
                time.sleep(0.05)
                continue
            for target in rng.sample(decodes, len(decodes)):
                answer = self._asked(attempt, target)
                for seen in self._looks(attempt, target, answer):
                    if PHASES.index(seen.phase(time.monotonic()) or PULLING) >= PHASES.index(phase):
                        return seen
                if answer and answer[0] == "done":
                    break  # quicker than we could look; another one
        return None

    def _asked(self, attempt: Attempt, target: str) -> list[str]:
        """Empty until the command has answered."""
        answer: list[str] = []
        threading.Thread(target=lambda: answer.append(self.migrate(attempt, target)), daemon=True).start()
        return answer

    def _looks(self, attempt: Attempt, target: str, answer: list[str]) -> Iterator[Seen]:
        """At its move, until the command has answered."""
        while not answer and not attempt.outcome:
            for seen in migrations(self.cluster, attempt.router):
                if seen.said.request_id == attempt.request_id and seen.said.target_worker == target and seen.is_open:
                    yield seen
