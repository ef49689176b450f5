"""A seed's faults, and what injects them one at a time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from diptych.v1 import generate_pb2, generate_pb2_grpc

from tests.support.chaos.cases import Case
from tests.support.chaos.clients import GRACE_S, Attempt, Ledger, Load, generate
from tests.support.chaos.cluster import ChaosCluster
from tests.support.chaos.moving import PHASES, Operator, Seen, all_migrations, phases
from tests.support.poisonable_worker import KILLS


@dataclass(frozen=True)
class Fault:
    kind: str
    target: str = ""
    seconds: float = 0.0  # how long it is stopped, down, slow
    seed: int = 0

    def __str__(self) -> str:
        return " ".join(x for x in (self.kind, self.target, f"{self.seconds:g} s" if self.seconds else "") if x)


KINDS = (
    "kill decode", "kill prefill", "stop decode", "stop prefill", "kill router", "stop router", "fill pools",
    "clients leave", "short deadlines", "drain decode", "drain prefill", "drain router", "slow transport", "poison",
    "kill leaving decode", "kill remaining decode", "kill switched decode", "kill source", "kill target",
    "switch decode", "switch prefill", "stand decode", "migrate some",
)  # fmt: skip
# Those that no answer may end of: enough workers live, and one fault is over before the next comes.
HARMLESS = (
    "drain decode", "drain prefill", "kill decode", "kill prefill", "kill leaving decode", "kill remaining decode",
    "kill switched decode", "kill source", "kill target", "switch decode", "switch prefill", "stand decode",
    "migrate some",
)  # fmt: skip


def plan(seed: int, cluster: ChaosCluster, kinds: Sequence[str] = KINDS) -> Iterator[Fault]:
    """Without end; every kind once before any comes again."""
    rng = random.Random(f"plan/{seed}")
    counts = {"decode": cluster.decode, "prefill": cluster.prefill, "router": cluster.routers}
    while True:
        for kind in rng.sample(kinds, len(kinds)):
            what = "decode" if kind == "slow transport" else kind.split()[-1]
            target = f"{what}-{rng.randrange(counts[what])}" if what in counts else ""
            longest = {"kill": 1.0, "stop": 6.0, "slow": 4.0, "switch": 3.0, "stand": 1.0}.get(kind.split()[0], 0.0)
            longest += len(kind.split()) > 2
            seconds = round(rng.uniform(0.2, longest), 2) if longest else 0.0
            yield Fault(kind, target, seconds, rng.getrandbits(32))


@dataclass(eq=False)
class Injected:
    fault: Fault
    at: float
    victim: str = ""
    phases: list[str] = field(default_factory=list)  # of the moves that it hit
    whole_at: float = 0.0  # when the cluster was whole again


class Driver:
    """One fault at a time; the cluster is whole, and has run for a moment, before the next."""

    def __init__(
        self,
        cluster: ChaosCluster,
        ledger: Ledger,
        load: Load,
        cases: Sequence[Case],
        big_cases: Sequence[Case],
        settle_s: float = 1.5,
        slow_bytes_per_s: float = 8e6,
        *,
        one_each: bool = False,
    ) -> None:
        """`one_each`: nobody is killed before all have ended that ran when somebody was last; two such workers within a
        minute can end an answer by chance (router/placement/crashes.py).
        """
        self.cluster, self.ledger, self.load = cluster, ledger, load
        self.cases, self.big_cases, self.settle_s = list(cases), list(big_cases), settle_s
        self.slow_bytes_per_s = slow_bytes_per_s
        self.operator = Operator(cluster, ledger)
        self.one_each = one_each
        self.injected: list[Injected] = []
        self._hit: list[Attempt] = []
        self._side: list[threading.Thread] = []

    def run(self, faults: Iterable[Fault], duration_s: float, say: Callable[[str], None]) -> None:
        end = time.monotonic() + duration_s
        self._settle()
        for fault in faults:
            if time.monotonic() >= end:
                break
            begun = time.monotonic()
            record = self.inject(fault)
            hit = f", {record.victim} hit {record.phases or 'no move'}" if record.victim else ""
            say(f"{fault}: whole again after {time.monotonic() - begun:.1f} s{hit}")
            self._settle()

    def inject(self, fault: Fault) -> Injected:
        record = Injected(fault, time.monotonic())
        self.injected.append(record)
        verb, name = fault.kind.split()[0], fault.target
        if verb == "kill" and self.one_each:
            self._let_the_hit_end()
        match verb:
            case "kill" if "leaving" in fault.kind or "remaining" in fault.kind:
                self._kill_at_a_drain(record, name, fault)
            case "kill" if "switched" in fault.kind:
                self._switch_and(lambda: self._kill(record, name, fault.seconds), name, fault)
            case "kill" if not name:
                record = self.injected[-1] = self.kill_at_a_move(fault)
            case "kill":
                self._kill(record, name, fault.seconds)
            case "switch":
                self._switch_and(lambda: time.sleep(fault.seconds), name, fault)
            case "stand":
                self.operator.drain(name, fault.seed % self.cluster.routers)
                time.sleep(fault.seconds)
                self._home(name, fault)
            case "migrate":
                self.operator.migrate_some(random.Random(fault.seed))
            case "stop":
                self._stop(record, name, fault.seconds)
            case "drain":
                self.cluster.drain(name, 45.0)
                self._back(name)
            case "slow":
                self.cluster.drain(name, 45.0)
                self._back(name, slow_bytes_per_s=self.slow_bytes_per_s)
                time.sleep(fault.seconds)
                self.cluster.drain(name, 45.0)
                self._back(name)
            case "fill":
                self._burst(fault, self.big_cases, 6, 30.0)
            case "short":
                self._burst(fault, self.cases, 8, None)
            case "clients":
                self._clients_leave(fault)
            case "poison":
                self._poison(fault)
            case _:
                raise ValueError(fault.kind)
        record.whole_at = time.monotonic()
        return record

    def _back(self, name: str, **transport: Any) -> None:
        since = time.time_ns()
        self.cluster.start_again(name, **transport)
        self.cluster.wait_whole(90.0, {name: since} if not name.startswith("router") else None)

    def _kill(self, record: Injected, name: str, down_s: float, before: list[Seen] | None = None) -> None:
        before = self._strike(record, name, before)
        time.sleep(down_s)
        self._back(name)
        self._count(record, before)

    def _strike(self, record: Injected, name: str, before: list[Seen] | None = None) -> list[Seen]:
        """Returns the moves that the routers told of just before; a look takes a moment, if there was none yet."""
        before = all_migrations(self.cluster) if before is None else before
        self._hit, record.victim, record.at = self.ledger.running(), name, time.monotonic()
        self.cluster.kill(name)
        return before

    def _count(self, record: Injected, before: list[Seen]) -> None:
        record.phases = phases(before, all_migrations(self.cluster), record.victim, record.at)

    def _let_the_hit_end(self) -> None:
        deadline = time.monotonic() + 120.0
        while any(not a.outcome for a in self._hit) and time.monotonic() < deadline:
            time.sleep(0.05)

    def kill_at_a_move(self, fault: Fault, phase: str = "") -> Injected:
        """Somebody asked for it; who gives or who takes dies, in this phase if it can be met, else in a random one."""
        record, rng = Injected(fault, time.monotonic()), random.Random(fault.seed)
        seen = self.operator.under_way(rng, phase or rng.choice(PHASES))
        if seen is not None:  # else nothing ran that was long enough
            victim = seen.said.source_worker if "source" in fault.kind else seen.said.target_worker
            self._kill(record, victim, fault.seconds, [seen])
        return record

    def _switch_and(self, then: Callable[[], None], name: str, fault: Fault) -> None:
        """Another role, and its own again: what was killed meanwhile begins with that."""
        rng = random.Random(fault.seed)
        own = name.split("-")[0]
        other = rng.choice([r for r in ("prefill", "decode", "standby") if r != own])
        self.operator.switch(name, other, rng.randrange(self.cluster.routers))
        then()
        self._home(name, fault)

    def _home(self, name: str, fault: Fault) -> None:
        self.operator.switch(name, name.split("-")[0], fault.seed % self.cluster.routers)

    def _stop(self, record: Injected, name: str, seconds: float) -> None:
        record.at = time.monotonic()
        self.cluster.freeze(name)
        time.sleep(seconds)
        self.cluster.thaw(name)
        if name.startswith("router"):
            for attempt in self.ledger.running():
                if f"router-{attempt.router}" == name:
                    attempt.excused_s += seconds
        self.cluster.wait_whole(60.0)

    def _kill_at_a_drain(self, record: Injected, name: str, fault: Fault) -> None:
        """Its answers are on their way elsewhere: it dies, or where they go to does."""
        process, since = self.cluster.processes.running[name], time.time_ns()
        self.cluster.terminate(name)
        time.sleep(fault.seconds)
        others = [n for n in self.cluster.workers if n.startswith("decode") and n != name]
        victim = name if "leaving" in fault.kind else random.Random(fault.seed).choice(others)
        before = self._strike(record, victim)
        self.cluster.start_again(victim)
        if victim != name:
            process.wait(45.0)
            self.cluster.kill(name)
            self.cluster.start_again(name)
        self.cluster.wait_whole(90.0, {name: since, victim: since})
        self._count(record, before)

    def _poison(self, fault: Fault) -> None:
        """A request that kills whichever worker computes it: two, and no third."""
        rng = random.Random(fault.seed)
        router, length = rng.randrange(self.cluster.routers), rng.choice((12, 420))
        request = generate_pb2.GenerateRequest(
            token_ids=generate_pb2.TokenIds(ids=[rng.randrange(3, 1000) for _ in range(length)]),
            sampling=generate_pb2.SamplingParams(temperature=1, seed=KILLS, max_tokens=4),
            deadline_ms=30_000,
        )
        stub = generate_pb2_grpc.GenerateServiceStub(self.cluster.channels[router])
        code, message = "OK", ""
        try:
            for _ in stub.Generate(request, timeout=31.0):
                pass
        except grpc.RpcError as error:
            code, message = error.code().name, error.details()  # type: ignore[attr-defined]
        honest = "two workers that crashed" in message if code == "INTERNAL" else code == "UNAVAILABLE"
        assert honest, f"the poison ended with {code} {message!r}"
        dead = self.cluster.wait_dead(2 if code == "INTERNAL" else 1)
        assert 1 <= len(dead) <= 2, f"the poison killed {dead}"
        since = time.time_ns()
        for name in dead:
            self.cluster.kill(name)
            self.cluster.start_again(name)
        self.cluster.wait_whole(90.0, dict.fromkeys(dead, since))

    def _burst(self, fault: Fault, cases: Sequence[Case], count: int, deadline_s: float | None) -> None:
        """Requests besides the load; without a deadline given, each gets a short one."""
        rng = random.Random(fault.seed)
        threads = []
        for _ in range(count):
            router, case = rng.randrange(self.cluster.routers), rng.choice(cases)
            seconds = deadline_s or round(rng.uniform(0.02, 1.5), 3)
            salt = f"{rng.getrandbits(64):x}"
            arguments = (self.cluster, self.ledger, case, router, seconds, salt)
            threads.append(threading.Thread(target=generate, args=arguments, daemon=True))
            threads[-1].start()
        self._join(threads, (deadline_s or 1.5) + 2 * GRACE_S)

    def _clients_leave(self, fault: Fault) -> None:
        rng = random.Random(fault.seed)
        threads = []
        for _ in range(8):
            how = {"cancel_after_s": rng.uniform(0, 2)} if rng.random() < 0.5 else {"cancel_at_token": rng.randrange(9)}
            case, router, salt = rng.choice(self.cases), rng.randrange(self.cluster.routers), f"{rng.random()}"
            arguments = (self.cluster, self.ledger, case, router, 30.0, salt)
            threads.append(threading.Thread(target=generate, args=arguments, kwargs=how, daemon=True))
            threads[-1].start()
        for session in self.load.sessions:
            session.cancel_some(0.5)
        self._join(threads, 30.0 + 2 * GRACE_S)
        rng.choice(self.load.sessions).break_off()

    @staticmethod
    def _join(threads: Sequence[threading.Thread], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.01, deadline - time.monotonic()))

    def _settle(self) -> None:
        time.sleep(self.settle_s)
