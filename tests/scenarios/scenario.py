"""One seed: a world, its requests, its faults, and what must be true afterwards.

Every completed answer is exact; every other request ended with an explicit error that the faults permit, in time; all
pools and tables are empty at the end. `run(seed)` raises ScenarioFailed with the seed in it; the same seed replays.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from engine.types import FinishReason
from kv_transfer.layout import FULL, Rule
from router.breakdown import Migration
from router.config import RouterConfig
from router.errors import Code, Failure, RequestRefused
from router.lifecycle import Life
from router.placement.cluster import Role
from router.placement.policy import BESIDE, Placement
from router.record.tracing import RequestTrace
from router.request import Finish, Request, Sampling
from tests.scenarios.adapters import NAMES, Adapting, has_adapters
from tests.scenarios.forks import further_answers, has_forks
from tests.scenarios.model import VOCABULARY, WrongKv, expected_answer, expected_logprobs
from tests.scenarios.moves import Moving, has_moves, is_calm
from tests.scenarios.network import Clock, Weather
from tests.scenarios.nodes import Shape, SimRouter, SimWorker, World
from tests.scenarios.switching import Switching, has_switches
from worker.wire import logprobs_to_wire

LOAD_S = 4.0  # requests come within this
GRACE_S = 1.5  # after its deadline a request must have ended
_POISON_SEED = 1 << 40  # those of other requests have 32 bits
_PATIENCE_S = 10.0  # of a client whose router is gone
QUIET_S = 60.0  # after the last request and fault everything must be empty

_CONFIG = RouterConfig(max_backlog_s=1e6)


class ScenarioFailed(AssertionError):
    pass


@dataclass
class SimClient:
    """What one client saw."""

    number: int
    request: Request
    placement: Placement
    cancel_at: float | None
    expected: list[int]
    router: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    failure: Failure | None = None
    ended_at: float | None = None
    problem: str = ""
    recoveries: int = 0
    adapter: str = ""  # its name
    moves: list[Migration] = field(default_factory=list)
    resumes: int = 0
    patient_until: float | None = None
    split: bool = False
    beside: bool = False  # it began where another answer to its prompt ran
    clock: Clock | None = None
    on_end: Callable[[], None] = lambda: None

    def started(self, life: Life) -> None:
        pass

    def token(self, position: int, token_id: int, text: str, logprobs: object | None) -> None:
        if self.ended_at is not None:
            self.problem = "a token after the end"
        if position != len(self.tokens):
            self.problem = f"position {position} where {len(self.tokens)} was due"
        self.tokens.append(token_id)
        if self.tokens != self.expected[: len(self.tokens)]:
            self.problem = self.problem or f"wrong token {token_id} at position {position}"
        wanted = None if self.request.sampling.logprobs is None else logprobs_to_wire(expected_logprobs(token_id))
        if logprobs != wanted:
            self.problem = self.problem or f"log-probabilities {logprobs} at position {position}"

    def finished(self, life: Life, reason: Finish) -> None:
        self._end(life)
        self.finish = reason

    def failed(self, life: Life, failure: Failure) -> None:
        self._end(life)
        self.failure = failure

    def _end(self, life: Life) -> None:
        assert self.clock is not None
        if self.ended_at is not None:
            self.problem = "ended twice"
        self.on_end()
        self.ended_at = self.clock.now
        self.recoveries = life.recoveries
        self.moves += life.breakdown.migrations
        self.split = life.route.split
        self.beside = life.routes[0].rule == BESIDE

    def refused(self, failure: Failure, now: float) -> None:
        self.failure, self.ended_at = failure, now

    def wake(self) -> None:
        pass


@dataclass
class Outcome:
    seed: int
    faults: list[str]
    outcomes: Counter[str]
    recoveries: int
    resumed: int  # complete over the death of their router
    moves: Counter[str]  # that arrived, by why they were wanted; and others, by why they did not
    switches: Counter[str]  # of roles
    split: int
    beside: int
    adopted: int
    poisoned: int  # workers that a poison request crashed
    virtual_s: float
    events: int


def _answer_of(request: Request) -> list[int]:
    s = request.sampling
    stops, penalised = frozenset(s.stop_token_ids), s.presence_penalty != 0
    return expected_answer(
        request.prompt, s.temperature, s.seed, s.max_tokens, 0, stops, penalised=penalised, adapter=request.adapter
    )


def _told(move: Migration) -> str:
    return move.why if move.outcome == "done" else "not: " + re.sub(r"[0-9.]+", "N", move.outcome)


def _rules(seed: int) -> tuple[Rule, ...]:
    """Half of the seeds have a layout of one group that keeps everything."""
    rng = random.Random(f"layout {seed}")
    window, chunk, state = Rule(window=rng.choice((1, 3, 8, 13))), Rule(chunk=rng.choice((4, 7, 16))), Rule(state=True)
    kinds = ((window,), (FULL, window), (FULL, chunk), (FULL, state), (FULL, window, state), (FULL, window, chunk))
    return rng.choice(kinds) if rng.random() < 0.5 else (FULL,)


def _original(seed: int) -> int:
    """A quarter of the seeds has a model with two rotary tables."""
    rng = random.Random(f"rope {seed}")
    return rng.choice((8, 16, 24, 40)) if rng.random() < 0.25 else 0


class Scenario:
    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        rng = self.rng = random.Random(seed)
        self.clock = Clock()
        weather = Weather(
            latency_s=rng.choice((0.0002, 0.001, 0.01)),
            jitter_s=rng.choice((0.0, 0.001, 0.02)),
            block_s=rng.choice((0.0002, 0.002, 0.02)),
            duplicates=rng.choice((0.0, 0.0, 0.1, 0.3)),
        )
        self.theme = rng.choice(("mixed", "mixed", "mixed", "leases", "cancels", "restarts", "pools"))
        if self.theme != "mixed":
            weather.block_s = rng.choice((0.005, 0.02, 0.05))  # transfers last: more can happen to them
        if self.theme == "restarts":
            weather.block_s = rng.choice((0.05, 0.15))
        small = self.theme != "mixed" or rng.random() < 0.3
        shape = Shape(
            block_tokens=rng.choice((2, 4)),
            prefill_blocks=rng.randint(26, 34) if small else 64,
            decode_blocks=rng.randint(40, 48) if small else 96,
            max_batch_tokens=rng.choice((8, 16, 32)),
            max_waiting=64,
            step_s=rng.choice((0.002, 0.01)),
            token_s=rng.choice((0.0002, 0.001)),
            digest=rng.random() < (0.5 if self.theme == "mixed" else 0.2),
            lease_s=rng.choice((0.2, 2.0, 10.0)),
            room_wait_s=rng.choice((0.05, 0.5, 2.0)),
            pull_timeout_s=rng.choice((0.3, 2.0, 10.0)),
            blocks_per_pull=rng.choice((1, 2, 8)),
            leased_share=max(rng.choice((0.4, 0.6, 1.0)), 1.0 if has_moves(seed) else 0.0),
            rules=_rules(seed),
            scarce=random.Random(f"room {seed}").random() < 0.5,
            original=_original(seed),
        )
        if has_switches(seed):  # equal pools, as workers should have that may change their roles
            shape = replace(shape, prefill_blocks=shape.decode_blocks)
        self.world = World(self.clock, weather, rng, shape, passive=rng.random() < 0.7)
        self.world.trace = trace
        self.calm = is_calm(seed)
        self.moving = Moving(seed, self.world, self._busy) if has_moves(seed) else None
        # Where roles change, loads become unequal too: there running answers also leave workers that are only slow.
        self.config = _CONFIG.model_copy(update={"balance": has_switches(seed)})
        self.switching = Switching(seed, self.world, self._busy) if has_switches(seed) else None
        if self.moving is not None and self.switching is not None:
            # Answers that are always on their way leave nobody who switches, and nor do those that are soon over.
            self.moving.by_hand = seed % 24 < 12
            self.moving.longest, self.moving.share_long, self.moving.worth = 250, 1.0, 0.2
            weather.block_s = min(weather.block_s, 0.002)
        self.adapting = Adapting(seed, self.world, self._busy) if has_adapters(seed) else None
        if self.adapting is not None:
            self.world.adapters_kept_s = self.adapting.kept_s
        self.num_prefill, self.num_decode = rng.choice(((1, 1), (1, 2), (2, 2), (2, 2), (2, 3)))
        self.num_decode = max(3 if has_switches(seed) else 2 if has_moves(seed) else 1, self.num_decode)
        self.num_routers = rng.choice((1, 1, 2))
        self.load_s = LOAD_S if self.theme == "mixed" else rng.choice((0.3, 1.0, 2.0))
        self.faults: list[str] = []
        self.disturbing_until = 0.0
        self.dead_routers: dict[str, list[float]] = {}
        self.router_faults = self.decode_faults = self.other_faults = 0
        self.leaving = 0  # decode workers that drain, and no fault
        self.poison: SimClient | None = None
        self.poisoned: list[str] = []  # workers that it crashed

    # Making.

    def build(self) -> None:
        for i in range(self.num_routers):
            SimRouter(self.world, f"r{i}", self.config)
        for role, count in ((Role.PREFILL, self.num_prefill), (Role.DECODE, self.num_decode)):
            for i in range(count):
                self.world.start_worker(f"{role.value[0]}{i}", role)
        self.clock.run(until=0.5)
        if self.adapting is not None:
            self.adapting.begin()
        self.clock.run(until=1.0)
        self.start = self.clock.now
        self.clients = [
            self._client(i) for i in range(self.rng.randint(*((2, 12) if self.theme == "mixed" else (6, 16))))
        ]
        if has_forks(self.seed):
            self.clients += further_answers(self.seed, self.clients, _answer_of, eager=self.theme == "cancels")
        for client in self.clients:
            client.on_end = self._look_for_orphans
            self.clock.at(client.request.arrived - self.clock.now, lambda c=client: self._submit(c))
        if not self.calm:
            self._plan_faults()
            if self.seed % 8 == 6:
                self._plan_poison()
        if self.moving is not None:
            self._plan_moves()
        if self.switching is not None:
            self.switching.begin()
        if self.adapting is not None:
            self._plan_adapters()

    def _plan_adapters(self) -> None:
        """Some name one; what it stands for is found out when they come."""
        adapting = self.adapting
        assert adapting is not None
        for client in self.clients:
            if adapting.rng.random() < adapting.share:
                client.adapter = adapting.rng.choice(NAMES)
                client.request = replace(client.request, emitted=())
                client.tokens.clear()
        adapting.go_on()

    def _plan_moves(self) -> None:
        """Running answers are asked to go on elsewhere, whatever else happens; half of them are long."""
        moving = self.moving
        assert moving is not None
        for client in self.clients:
            if client is not self.poison and moving.rng.random() < moving.share_long:
                self._ask_for_more(client, moving.rng.randint(20, moving.longest))
        moving.begin()
        if not self.calm and self.num_decode > 1 and moving.rng.random() < 0.5:
            at = moving.rng.random() * self.load_s
            self.faults.append(f"{at:.3f} {self._drain(at, f'd{moving.rng.randrange(self.num_decode)}')}")

    def _ask_for_more(self, client: SimClient, max_tokens: int) -> None:
        r = client.request
        most = self.world.shape.decode_blocks * self.world.shape.block_tokens - len(r.prompt)
        sampling = replace(r.sampling, max_tokens=max(r.sampling.max_tokens, min(max_tokens, most)))
        client.request = replace(r, sampling=sampling)
        client.expected = _answer_of(client.request)

    def _plan_poison(self) -> None:
        """One of the requests is a query of death: whoever computes it crashes, and is back a little later."""
        rng = random.Random(self.seed)  # of its own: the other draws stay as they are
        client = self.poison = rng.choice(self.clients)
        sampling = replace(client.request.sampling, seed=_POISON_SEED, temperature=1.0)
        client.request = replace(client.request, sampling=sampling, emitted=())
        client.tokens.clear()
        client.expected = _answer_of(client.request)
        back = rng.choice((0.1, 0.5, 2.0))
        self.faults.append(f"q{client.number} is poison, workers are back after {back} s")
        self.decode_faults += 2
        self.world.poison_seed = _POISON_SEED

        def crashed(worker: SimWorker) -> None:
            name, role = worker.peer.worker_id, worker.role
            self.poisoned.append(name)
            self.disturbing_until = max(self.disturbing_until, self.clock.now + back + 2.0)
            self.clock.at(back, lambda: self.world.worker(name) or self.world.start_worker(name, role))

        self.world.on_poisoned = crashed

    def _client(self, number: int) -> SimClient:
        rng, bt = self.rng, self.world.shape.block_tokens
        longest = min(self.world.shape.prefill_blocks - 2, 24) * bt
        length = rng.choice((rng.randint(1, 2 * bt), rng.randint(bt, longest), longest // 2))
        if self.theme == "pools":
            length = rng.randint(longest // 2, longest)
        elif self.theme == "restarts":
            length = rng.randint(3 * bt, longest // 2)
        shared = [(i * 7 + 3) % VOCABULARY for i in range(length)] if rng.random() < 0.4 else []
        prompt = shared[: rng.randint(0, len(shared))] if shared else []
        prompt += [rng.randrange(VOCABULARY) for _ in range(length - len(prompt))]
        sampling = Sampling(
            max_tokens=rng.choice((1, 2, rng.randint(1, 30))),
            temperature=rng.choice((0.0, 1.0)),
            seed=rng.getrandbits(32),
            min_tokens=0,
            stop_token_ids=tuple(rng.sample(range(VOCABULARY), 20)) if rng.random() < 0.3 else (),
            logprobs=1 if number % 3 == 0 else None,
            presence_penalty=0.5 if number % 5 == 2 else 0.0,
        )
        arrived = self.start + rng.random() * self.load_s
        deadline = arrived + (rng.choice((0.05, 0.5, 2.0)) if rng.random() < 0.1 else 60.0)
        request = Request(
            f"q{number}",
            prompt,
            sampling,
            arrived,
            deadline,
            priority=rng.choice((0, 0, 0, 5)),
            cache_salt=rng.choice(("", "", "tenant")),
        )
        expected = _answer_of(request)
        if number % 4 == 3:  # its first stream broke
            request = replace(request, emitted=tuple(expected[: len(expected) // 2]))
        cancelled = rng.random() < (0.6 if self.theme == "cancels" else 0.15)
        cancel_at = arrived + rng.random() * rng.choice((0.05, 0.3, 1.0)) if cancelled else None
        placements = (Placement.SPLIT, Placement.SPLIT, Placement.AUTO, Placement.LOCAL)
        placement = rng.choice(placements if self.theme == "mixed" else placements[:3])
        return SimClient(
            number, request, placement, cancel_at, expected, tokens=list(request.emitted), clock=self.clock
        )

    def _submit(self, client: SimClient) -> None:
        routers = sorted(self.world.routers)
        now = self.clock.now
        if not routers:
            self._refused(client, Failure(Code.UNAVAILABLE, "connection refused"))
            return
        client.router = self.rng.choice(routers)
        router = self.world.routers[client.router]
        if client.adapter and not client.request.adapter:
            digest = router.dispatcher.adapters.digests().get(client.adapter, "")
            if not digest:
                self._refused(client, Failure(Code.NOT_FOUND, f"model {client.adapter!r} is not served here"))
                return
            client.request = replace(client.request, adapter=digest)
            client.expected = _answer_of(client.request)
        placement = client.placement
        if placement is Placement.SPLIT and not router.has_ready(Role.PREFILL):
            placement = Placement.AUTO
        self.world.say(
            f"q{client.number} arrives at {client.router}: {len(client.request.prompt)} tokens, "
            f"{len(client.expected)} to come, {placement.value}"
        )
        try:
            router.dispatcher.dispatch(client.request, placement, client, RequestTrace(client.request.request_id, None))
        except RequestRefused as error:
            if placement is Placement.SPLIT and error.failure.code is Code.FAILED_PRECONDITION:
                client.placement = Placement.AUTO
                self._submit(client)
                return
            self._refused(client, error.failure)
            return
        if client.cancel_at is not None and client.cancel_at > now:
            self.clock.at(
                client.cancel_at - now,
                lambda: router.dispatcher.cancel(client.request.request_id) if router.alive else None,
            )

    def _refused(self, client: SimClient, failure: Failure) -> None:
        """A client is patient while a router comes back and its workers find it."""
        now = self.clock.now
        client.router = ""
        if client.patient_until is None:
            client.patient_until = min(now + _PATIENCE_S, client.request.deadline)
        if failure.code is Code.UNAVAILABLE and self.router_faults and now + 0.2 < client.patient_until:
            self.clock.at(0.2, lambda: self._submit(client))
        else:
            client.refused(failure, now)

    def _come_back(self, client: SimClient) -> None:
        """As proto/diptych/client does when its stream breaks: the same request with what was heard, to any router."""
        client.router, client.patient_until = "", None
        client.resumes += 1

        def again() -> None:
            client.request = replace(client.request, emitted=tuple(client.tokens))
            self._submit(client)

        self.clock.at(0.05 + self.clock.now % 0.3, again)

    # Faults.

    def _plan_faults(self) -> None:
        rng = self.rng
        count = rng.choices((0, 1, 2, 3, 4), (1, 6, 1, 1, 1))[0]
        kinds: list[tuple[str, Callable[[float], str]]] = [
            ("crash", self._crash),
            ("crash", self._crash),
            ("vanish", self._vanish),
            ("stall", self._stall),
            ("cut", self._cut),
            ("isolate", self._isolate),
            ("reset", self._reset_stream),
            ("reset", self._reset_router_link),
            ("freeze", self._freeze),
            ("slow", self._slow),
            ("expire", self._expire),
            ("drain", self._drain),
            ("router", self._crash_router),
            ("corrupt", self._corrupt),
        ]
        if self.theme == "leases":
            kinds = [("expire", self._expire), ("expire", self._expire), ("reset", self._reset_stream)]
            count = max(count, 1)
        elif self.theme == "restarts":
            kinds = [("crash", self._crash), ("vanish", self._vanish), ("vanish", self._vanish)]
            count = max(count, 2)
        elif self.theme == "cancels" and rng.random() < 0.5:
            count = 0  # then a cancel must free everything by itself
        for _ in range(count):
            _, plan = rng.choice(kinds)
            at = rng.random() * (0.5 if self.theme == "restarts" else self.load_s + 0.5)
            self.faults.append(f"{at:.3f} {plan(at)}")
        if self.seed % 5 == 4:  # whatever else: clients must find a way back
            at = rng.random() * self.load_s
            self.faults.append(f"{at:.3f} {self._crash_router(at)}")

    def _later(self, at: float, lasts: float, act: Callable[[], None]) -> None:
        self.clock.at(at, act)
        self.disturbing_until = max(self.disturbing_until, self.start + at + lasts)

    def _worker_name(self) -> tuple[str, Role]:
        role = self.rng.choice((Role.PREFILL, Role.DECODE))
        count = self.num_prefill if role is Role.PREFILL else self.num_decode
        if role is Role.DECODE:
            self.decode_faults += 1
        else:
            self.other_faults += 1
        return f"{role.value[0]}{self.rng.randrange(count)}", role

    def _edge(self) -> tuple[str, str]:
        self.other_faults += 1
        return f"p{self.rng.randrange(self.num_prefill)}", f"d{self.rng.randrange(self.num_decode)}"

    def _crash(self, at: float) -> str:
        name, role = self._worker_name()
        back = self.rng.choice((0.05, 0.5, 3.0))

        def act() -> None:
            worker = self.world.worker(name)
            if worker is not None:
                worker.die()
            self.clock.at(back, lambda: self.world.worker(name) or self.world.start_worker(name, role))

        self._later(at, back + 2.0, act)
        return f"kill {name}, back after {back} s"

    def _vanish(self, at: float) -> str:
        """The host loses power: nobody is told, and it is back before the others give it up."""
        name, role = self._worker_name()
        quick = self.theme == "restarts"
        back = self.rng.choice((0.005, 0.02) if quick else (0.02, 0.3, 2.0, 6.0))
        routers_see_it = self.rng.random() < (0.9 if quick else 0.5)

        def act() -> None:
            worker = self.world.worker(name)
            if worker is not None:
                worker.vanish(routers_see_it=routers_see_it)
            self.clock.at(back, lambda: self.world.worker(name) or self.world.start_worker(name, role))

        self._later(at, back + 6.0, act)
        return f"power off {name}, back after {back} s"

    def _drain(self, at: float, decode: str = "") -> str:
        name, role = (decode, Role.DECODE) if decode else self._worker_name()
        self.leaving += bool(decode)

        def restart() -> None:
            self.clock.at(0.1, lambda: self.world.worker(name) or self.world.start_worker(name, role))

        def act() -> None:
            worker = self.world.worker(name)
            if worker is not None and not worker.leaving:
                worker.drain(restart)

        self._later(at, 25.0, act)
        return f"drain {name} and restart it"

    def _stall(self, at: float) -> str:
        name, _ = self._worker_name()
        seconds = self.rng.choice((0.1, 1.0, 3.5, 7.0))

        def act() -> None:
            worker = self.world.worker(name)
            if worker is not None:
                self.world.say(f"{name} stands still for {seconds} s")
                worker.stall(seconds)

        self._later(at, seconds + 2.0, act)
        return f"stop {name} for {seconds} s"

    def _cut(self, at: float) -> str:
        source, reader = self._edge()
        seconds = self.rng.choice((0.1, 1.0, 5.0, 8.0))

        def act() -> None:
            self.world.say(f"{source} and {reader} are cut for {seconds} s")
            self.world.weather.cut[frozenset((source, reader))] = self.clock.now + seconds
            self._break_silent(source, reader, seconds)

        self._later(at, seconds + 4.0, act)
        return f"cut {source}-{reader} for {seconds} s"

    def _isolate(self, at: float) -> str:
        name, _ = self._worker_name()
        seconds = self.rng.choice((0.1, 1.0, 5.0, 8.0))

        def act() -> None:
            self.world.say(f"{name} is cut off for {seconds} s")
            self.world.weather.isolated[name] = self.clock.now + seconds
            worker = self.world.worker(name)
            if worker is None:
                return
            if seconds > 3.0:
                for stream in (*worker.readers.values(), *worker.sources.values()):
                    self.clock.at(3.0, lambda s=stream: s.broke("silent"))
            if seconds > 4.0:
                for link in worker.routers.values():
                    self.clock.at(4.0, lambda k=link: k.broke("keepalive"))

        self._later(at, seconds + 5.0, act)
        return f"cut {name} off for {seconds} s"

    def _break_silent(self, source: str, reader: str, seconds: float) -> None:
        worker = self.world.worker(source)
        if worker is None or seconds <= 3.0:
            return
        for peer, stream in worker.readers.items():
            if peer.worker_id == reader:
                self.clock.at(3.0, lambda s=stream: s.broke("silent"))

    def _reset_stream(self, at: float) -> str:
        source, reader = self._edge()

        def act() -> None:
            worker = self.world.worker(source)
            for peer, stream in list(worker.readers.items()) if worker is not None else ():
                if peer.worker_id == reader:
                    self.world.say(f"the stream {source}-{reader} breaks")
                    stream.broke("reset")

        self._later(at, 1.0, act)
        return f"reset the stream {source}-{reader}"

    def _reset_router_link(self, at: float) -> str:
        name, _ = self._worker_name()

        def act() -> None:
            worker = self.world.worker(name)
            if worker is not None and worker.routers:
                self.world.say(f"a router's stream to {name} breaks")
                self.rng.choice(list(worker.routers.values())).broke("reset")

        self._later(at, 1.0, act)
        return f"reset a router's stream to {name}"

    def _freeze(self, at: float) -> str:
        edge = self._edge()
        seconds = self.rng.choice((0.5, 3.0, 15.0))

        def act() -> None:
            self.world.say(f"data {edge[0]}->{edge[1]} stands still for {seconds} s")
            self.world.weather.frozen[edge] = self.clock.now + seconds

        self._later(at, seconds + 4.0, act)
        return f"freeze data {edge[0]}->{edge[1]} for {seconds} s"

    def _slow(self, at: float) -> str:
        edge = self._edge()
        factor = self.rng.choice((10.0, 100.0))

        def act() -> None:
            self.world.say(f"data {edge[0]}->{edge[1]} is {factor:g} times slower")
            self.world.weather.slow[edge] = factor
            self.clock.at(5.0, lambda: self.world.weather.slow.pop(edge, None))

        self._later(at, 40.0, act)
        return f"slow data {edge[0]}->{edge[1]} by {factor:g}"

    def _expire(self, at: float) -> str:
        """At the worst moment: while readers pull, and the word that it expired is late."""
        name = f"p{self.rng.randrange(self.num_prefill)}"
        late = self.rng.choice((0.0, 0.3, 1.0, 2.5))
        self.other_faults += 1

        def act() -> None:
            worker = self.world.worker(name)
            if worker is not None:
                self.world.say(f"all leases of {name} expire, readers hear of it {late} s later")
                for peer in worker.readers:
                    self.world.weather.deaf[frozenset((name, peer.worker_id))] = self.clock.now + late
                worker.source.tick(self.clock.now + 1e6)
                worker._flush()

        for _ in range(6):
            self._later(at, late + 1.0, act)
            at += self.rng.random() * 0.3
        return f"expire the leases of {name}, told {late} s later"

    def _crash_router(self, at: float) -> str:
        name = f"r{self.rng.randrange(self.num_routers)}"
        self.router_faults += 1

        def act() -> None:
            router = self.world.routers.get(name)
            if router is None:
                return
            router.die()
            for client in self.clients:  # their connections break
                if client.router == name and client.ended_at is None:
                    self._come_back(client)
            self.clock.at(0.3, lambda: SimRouter(self.world, name, self.config))

        self._later(at, 3.0, act)
        return f"kill router {name}"

    def _corrupt(self, at: float) -> str:
        edge = self._edge()
        if not self.world.shape.digest:
            return "nothing"
        self._later(at, 1.0, lambda: self.world.weather.corrupt.__setitem__(edge, self.rng.randint(1, 3)))
        return f"spoil bytes {edge[0]}->{edge[1]}"

    # Running.

    def run(self) -> Outcome:
        try:
            self.build()
            self._run()
            self._check()
        except ScenarioFailed:
            raise
        except (AssertionError, WrongKv, Exception) as error:
            raise ScenarioFailed(f"seed {self.seed}: {type(error).__name__}: {error}\n{self._story()}") from error
        counts: Counter[str] = Counter()
        for c in self.clients:
            counts[c.finish.value if c.finish else c.failure.code.name if c.failure else "nothing"] += 1
        return Outcome(
            self.seed,
            self.faults,
            counts,
            sum(c.recoveries for c in self.clients),
            sum(c.resumes > 0 and c.finish in (Finish.STOP, Finish.LENGTH) for c in self.clients),
            Counter(_told(m) for c in self.clients for m in c.moves),
            Counter() if self.switching is None else self.switching.told,
            sum(c.split for c in self.clients),
            sum(c.beside for c in self.clients),
            sum(getattr(w.core, "_adopted_total", 0) for w in self.world.workers.values()),
            len(self.poisoned),
            self.clock.now,
            self.clock.events,
        )

    def _run(self) -> None:
        last = max(c.request.deadline for c in self.clients) + GRACE_S
        self.clock.run(until=last, done=lambda: all(c.ended_at is not None for c in self.clients))
        ended = self.clock.now
        if not self.faults:
            # Nothing is left to leases and timeouts when nothing went wrong, cancelled requests included. Only bytes of
            # a move that the end of its answer broke off may still be on a slow line.
            self.clock.run(until=self.clock.now + QUIET_S, done=lambda: self._quiet(but_for_late_bytes=True))
            took = self.clock.now - ended
            is_quiet = self._quiet(but_for_late_bytes=True)  # else the checks say what is left
            assert took < 1.0 or not is_quiet, f"{took:.2f} s after the last request's end something was still held"
        self.clock.run(until=max(self.clock.now, self.disturbing_until) + QUIET_S, done=self._quiet)

    def _look_for_orphans(self) -> None:
        """Where nothing went wrong, a lease that no live request knows goes soon, and not by expiry."""
        if self.faults:
            return

        def orphans() -> set[str]:
            lives = [live.life for r in self.world.routers.values() for live in r.dispatcher._live.values()]
            known = {life._handoff.handoff_id for life in lives if life._handoff is not None}
            sources = [w.source for w in self.world.workers.values()]
            lent = {
                h for source in sources for h in source._handoffs if h.endswith("/prefix")
            }  # the reader's word ends them
            return {h for source in sources for h in source._handoffs} - known - lent

        def first_look() -> None:
            before = orphans()
            self.clock.at(0.1, lambda: again(before))

        def again(before: set[str]) -> None:
            assert not (left := before & orphans()), f"nobody knows the leases {left} and they stay"

        self.clock.at(0.05, first_look)

    def _busy(self) -> bool:
        return any(c.ended_at is None for c in self.clients)

    def _quiet(self, *, but_for_late_bytes: bool = False) -> bool:
        """Everything is over; only heartbeats and probes go on."""
        now = self.clock.now
        if now < self.disturbing_until or self._busy() or (self.switching is not None and self.switching.problem()):
            return False

        def is_quiet(w: SimWorker) -> bool:
            if w.core.load().quarantined_blocks:
                return but_for_late_bytes and not w.core.hosted_sequences and w.source.is_idle()
            return w.core.is_idle() and w.pool.is_idle() and not w._inbox

        live = any(r.dispatcher.live_requests for r in self.world.routers.values())
        return not live and all(is_quiet(w) for w in self.world.workers.values())

    # Checking.

    def _check(self) -> None:
        for client in self.clients:
            problem = self._problem(client)
            if problem:
                raise ScenarioFailed(f"seed {self.seed}: q{client.number}: {problem}\n{self._story()}")
        for client in self.clients if self.moving is not None else ():
            problem = self.moving.problem(client.moves)
            assert not problem, f"q{client.number}: {problem}"
        problem = "" if self.switching is None else self.switching.problem()
        assert not problem, problem
        if self.calm:
            assert self.moving is not None
            wrong = self.moving.disturbed(list(self.world.workers.values()))
            assert not wrong, wrong
        for worker in self.world.workers.values():
            name = worker.peer.worker_id
            worker.core.check()
            assert worker.core.hosted_sequences == 0, f"{name} still hosts a sequence"
            assert worker.core.is_idle(), f"{name} is not idle {QUIET_S:g} s after the last request"
            assert worker.pool.is_idle(), f"{name} holds blocks"
        for router in self.world.routers.values():
            router.dispatcher.check_empty()

    def _problem(self, c: SimClient) -> str:
        if c is self.poison and len(self.poisoned) > 2 * (1 + c.resumes):
            return f"the poison went on to the next worker: {', '.join(self.poisoned)}"
        if c is self.poison and c.finish in (Finish.STOP, Finish.LENGTH):
            return "somebody computed the poison"
        if c.problem:
            return c.problem
        if c.ended_at is None:
            return "never ended"
        if c.ended_at > c.request.deadline + GRACE_S:
            return f"ended {c.ended_at - c.request.deadline:.3f} s after its deadline"
        if c.finish in (Finish.STOP, Finish.LENGTH):
            if c.tokens != c.expected:
                return f"complete after {len(c.tokens)} tokens, {len(c.expected)} were due"
            stopped = c.tokens[-1] in c.request.sampling.stop_token_ids
            right = FinishReason.STOP if stopped else FinishReason.LENGTH
            return "" if c.finish.value == right.value else f"finished by {c.finish.value}, right is {right.value}"
        if c.finish is Finish.CANCELLED:
            return "" if c.cancel_at is not None else "cancelled by nobody"
        assert c.failure is not None
        return "" if self._permitted(c, c.failure) else f"{c.failure.code.name}: {c.failure.message}"

    def _permitted(self, c: SimClient, failure: Failure) -> bool:
        """A single fault excuses nothing where another worker lives."""
        if self._adapter_excuses(c, failure):
            return True
        code, faults = failure.code, self.decode_faults + self.other_faults + self.router_faults
        short = c.request.deadline - c.request.arrived < 10.0
        if code is Code.DEADLINE_EXCEEDED:
            return c.ended_at is not None and c.ended_at >= c.request.deadline - 1e-6 and (short or faults > 0)
        if code is Code.RESOURCE_EXHAUSTED:
            return short  # refused early instead of late
        if code is Code.INTERNAL:  # it was in two crashed batches, by its own doing or by chance
            return "two workers that crashed" in failure.message and (self.poison is not None or faults > 1)
        if code is Code.UNAVAILABLE:
            alone = self.decode_faults > 0 and self.num_decode - self.leaving == 1  # who leaves takes no new ones
            return faults > 1 or alone or (self.router_faults > 0 and short)  # no time to wait for a router's workers
        return False

    def _adapter_excuses(self, c: SimClient, failure: Failure) -> bool:
        """One that was replaced or unloaded excuses those that began on it, elsewhere than where they ran."""
        if not c.adapter or failure.code not in (Code.NOT_FOUND, Code.UNAVAILABLE):
            return False
        changed = self.adapting is not None and self.adapting.changed(c.adapter, c.request.arrived - 1.0)
        return failure.code is Code.NOT_FOUND or changed or "there is no adapter" in failure.message

    def _story(self) -> str:
        w = self.world
        lines = [
            f"replay: python -m tests.scenarios.soak --trace {self.seed}",
            f"{self.num_routers} routers, {self.num_prefill} prefill, {self.num_decode} decode, {w.shape}",
            f"faults: {self.faults or 'none'}",
        ]
        for c in self.clients if hasattr(self, "clients") else ():
            end = c.finish.value if c.finish else c.failure.code.name if c.failure else "open"
            lines.append(
                f"q{c.number} at {c.request.arrived:.3f} on {c.router}: {len(c.request.prompt)} tokens, "
                f"{c.placement.value}, {len(c.tokens)}/{len(c.expected)} tokens, {end} at {c.ended_at}"
            )
        return "\n".join(lines)


def run(seed: int, trace: Callable[[str], None] | None = None) -> Outcome:
    scenario = Scenario(seed, trace)
    if scenario.moving is None:
        return scenario.run()
    with scenario.moving.patched():
        return scenario.run()
