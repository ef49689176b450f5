"""n answers to one prompt: what each says, what all of them cost and hold, and what is left."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer.layout import FULL, Rule
from router.placement.cluster import Role
from router.placement.policy import BESIDE, Placement
from router.record.tracing import RequestTrace
from router.request import Finish, Request, Sampling
from tests.scenarios.network import Clock, Weather
from tests.scenarios.nodes import Shape, SimRouter, SimWorker, World
from tests.scenarios.scenario import _CONFIG, SimClient, _answer_of

BLOCK, PROMPT, ANSWER = 16, 39, 9  # prompt and answer are three blocks, two of which hold the prompt alone
SEED = 70
SPLIT, LOCAL = Placement.SPLIT, Placement.LOCAL


@dataclass
class Cluster:
    """One prefill and one decode worker. Nothing goes wrong but what a test does."""

    rules: tuple[Rule, ...] = (FULL,)
    num_decode: int = 1
    clients: list[SimClient] = field(default_factory=list)
    most_blocks: int = 0  # that the decode workers held at a time

    def __post_init__(self) -> None:
        self.clock = Clock()
        shape = Shape(
            BLOCK, 96, 96, 1024, 256, 0.01, 0.00001, digest=False, lease_s=10.0, room_wait_s=2.0, pull_timeout_s=10.0,
            blocks_per_pull=8, leased_share=1.0, rules=self.rules, max_running=80,
        )  # fmt: skip
        self.world = World(self.clock, Weather(0.0002, 0.0, 0.0002, 0.0), random.Random(1), shape, passive=True)
        self.router = SimRouter(self.world, "r0", _CONFIG)
        whims: Any = SimpleNamespace(random=lambda: 1.0)  # no prefix is pulled
        self.router.dispatcher._whims = whims
        self.world.start_worker("p0", Role.PREFILL)
        for i in range(self.num_decode):
            self.world.start_worker(f"d{i}", Role.DECODE)
        self.clock.run(until=1.5)

    @property
    def decodes(self) -> list[SimWorker]:
        return [w for w in self.world.workers.values() if w.role is Role.DECODE]

    def ask(self, n: int, placement: Placement, max_tokens: int = ANSWER) -> list[SimClient]:
        """`n` answers to one prompt."""
        now = self.clock.now
        prompt = [i * 7 % 900 for i in range(PROMPT)]
        asked: list[SimClient] = []
        for i in range(n):
            sampling = Sampling(max_tokens=max_tokens, temperature=1.0, seed=SEED + i)
            beside = asked[0].request.key if asked else ""
            request = Request(f"q{i}", prompt, sampling, now, now + 60.0, again=i > 0, beside=beside)
            client = SimClient(i, request, placement, None, _answer_of(request), clock=self.clock)
            self.router.dispatcher.dispatch(request, placement, client, RequestTrace(request.request_id, None))
            asked.append(client)
        self.clients += asked
        return asked

    def cancel(self, *clients: SimClient) -> None:
        for client in clients:
            client.cancel_at = self.clock.now
            self.router.dispatcher.cancel(client.request.key)

    def run(self, until_tokens: int | None = None) -> None:
        """Until all have ended, or the first of them has so many tokens."""
        end = self.clock.now + 30.0
        while self.clock.now < end:
            if until_tokens is not None and len(self.clients[0].tokens) >= until_tokens:
                return
            if all(c.ended_at is not None for c in self.clients):
                break
            self.clock.run(until=self.clock.now + 0.001)
            self.most_blocks = max([self.most_blocks, *(w.pool.blocks_in_use for w in self.decodes)])
        self.clock.run(until=self.clock.now + 1.0)
        self.check()

    def check(self) -> None:
        """Everybody has ended, those that were not cancelled with the right tokens; nothing is left."""
        for c in self.clients:
            assert not c.problem, f"q{c.number}: {c.problem}"
            assert c.failure is None, f"q{c.number}: {c.failure}"
            if c.cancel_at is None:
                assert c.finish is Finish.LENGTH
                assert c.tokens == c.expected
        self.router.dispatcher.check_empty()
        for w in self.world.workers.values():
            w.core.check()
            assert w.core.is_idle()
            assert w.pool.is_idle()

    @property
    def computed(self) -> dict[str, int]:
        """Tokens of prompts, by worker, that were not found cached."""
        totals = {w.peer.worker_id: w.core.load() for w in self.world.workers.values()}
        return {name: load.prompt_tokens_total - load.cached_tokens_total for name, load in totals.items()}

    @property
    def pulled_bytes(self) -> int:
        return sum(w.core.pulled_bytes_total for w in self.decodes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_split_answers_share_one_prefill_and_one_handoff(n: int) -> None:
    cluster = Cluster()
    cluster.ask(n, SPLIT)
    cluster.run()
    tail = PROMPT - 2 * BLOCK
    assert cluster.computed == {"p0": PROMPT, "d0": PROMPT + (n - 1) * tail}, "that of the first was pulled"
    assert cluster.pulled_bytes == 3 * BLOCK * 8, "the prompt's three blocks, whatever n is"
    assert cluster.most_blocks == 2 + n, "the prompt's two whole blocks, and a last one for each answer"
    assert [c.beside for c in cluster.clients] == [False, *[True] * (n - 1)]


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_local_answers_share_one_prefill(n: int) -> None:
    cluster = Cluster()
    cluster.ask(n, LOCAL)
    cluster.run()
    assert cluster.computed == {"p0": 0, "d0": PROMPT + (n - 1) * (PROMPT - 2 * BLOCK)}
    assert cluster.pulled_bytes == 0
    assert cluster.most_blocks == 2 + n


@pytest.mark.parametrize("rules", [(FULL, Rule(window=8)), (FULL, Rule(state=True))], ids=str)
@pytest.mark.parametrize("placement", [SPLIT, LOCAL])
def test_windows_and_states(rules: tuple[Rule, ...], placement: Placement) -> None:
    cluster = Cluster(rules)
    for worker in cluster.router.dispatcher.cluster.workers.values():
        object.__setattr__(worker.info, "fixed_bytes", 64)
    cluster.ask(5, placement)
    cluster.run()
    assert not any(c.beside for c in cluster.clients), "what windows have left is not on the reader"


@pytest.mark.parametrize("placement", [SPLIT, LOCAL])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
def test_the_first_answer_is_cancelled(placement: Placement, tokens: int) -> None:
    """Before its prompt stands the next one goes first; later the others go on with the blocks that they share."""
    cluster = Cluster()
    first, *others = cluster.ask(6, placement)
    cluster.run(until_tokens=tokens)
    cluster.cancel(first, others[0])
    cluster.run()
    assert first.finish is others[0].finish is Finish.CANCELLED
    assert all(c.finish is Finish.LENGTH for c in others[1:])


def test_a_client_that_leaves_starts_nothing_more() -> None:
    cluster = Cluster()
    answers = cluster.ask(20, SPLIT)
    cluster.cancel(*answers)
    assert next(cluster.router.dispatcher._leg_numbers) == 3, "the two legs of the first answer"
    cluster.run()
    assert next(cluster.router.dispatcher._leg_numbers) == 4


@pytest.mark.parametrize("placement", [SPLIT, LOCAL])
def test_answers_of_one_token(placement: Placement) -> None:
    cluster = Cluster()
    cluster.ask(4, placement, max_tokens=1)
    cluster.run()


@pytest.mark.parametrize("tokens", [0, 1, 4])
@pytest.mark.parametrize("name", ["p0", "d0"])
@pytest.mark.parametrize("placement", [SPLIT, LOCAL])
def test_a_worker_dies(placement: Placement, name: str, tokens: int) -> None:
    """Each answer goes on by itself where the others had begun; else they wait for the first, and begin where it is."""
    cluster = Cluster(num_decode=2)
    cluster.ask(6, placement)
    cluster.run(until_tokens=tokens)
    worker = cluster.world.worker(name)
    assert worker is not None
    worker.die()
    cluster.run()
    moved = [c.recoveries for c in cluster.clients]
    assert all(n <= 1 for n in moved), moved


def test_all_go_down_with_a_prompt_that_cannot_be_computed() -> None:
    """It crashes whoever computes it, and is not tried once for each answer."""
    cluster = Cluster(num_decode=4)
    cluster.world.poison_seed = SEED
    first, *others = cluster.ask(6, LOCAL)
    cluster.clock.run(until=cluster.clock.now + 5.0)
    assert len(cluster.decodes) == 2, "two of four are still there"
    assert first.failure is not None
    assert all(c.failure == first.failure for c in others)


def test_an_answer_that_comes_late_begins_at_once() -> None:
    cluster = Cluster()
    first, late = cluster.ask(1, SPLIT)[0], Sampling(max_tokens=ANSWER, temperature=1.0, seed=99)
    cluster.run(until_tokens=4)
    now = cluster.clock.now
    request = Request("late", first.request.prompt, late, now, now + 60.0, again=True, beside=first.request.key)
    client = SimClient(7, request, SPLIT, None, _answer_of(request), clock=cluster.clock)
    cluster.router.dispatcher.dispatch(request, SPLIT, client, RequestTrace("late", None))
    live = cluster.router.dispatcher._live["late"]
    assert live.life.route.rule == BESIDE
    cluster.clients.append(client)
    cluster.run()


def test_an_answer_does_not_wait_for_a_stranger_under_the_id_of_its_first() -> None:
    cluster = Cluster()
    (first,) = cluster.ask(1, LOCAL)
    cluster.run()
    now, prompt = cluster.clock.now, [5] * PROMPT
    stranger = replace(first.request, prompt=prompt, arrived=now, deadline=now + 60.0)
    own = replace(first.request, request_id="late", arrived=now, deadline=now + 60.0, again=True, beside=stranger.key)
    for request in (stranger, own):
        client = SimClient(len(cluster.clients), request, LOCAL, None, _answer_of(request), clock=cluster.clock)
        cluster.router.dispatcher.dispatch(request, LOCAL, client, RequestTrace(request.request_id, None))
        cluster.clients.append(client)
    assert [len(cluster.router.dispatcher._live[key].life.legs) for key in ("q0", "late")] == [1, 1]
    cluster.run()


def test_only_the_first_answer_teaches_how_long_prompts_take(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    learned: list[str] = []
    known = cluster.router.dispatcher.cluster
    monkeypatch.setattr(known, "learned_ttft", lambda key, *_: learned.append(key.worker_id))
    monkeypatch.setattr(known, "learned_handoff", lambda key, *_: learned.append(key.worker_id))
    cluster.ask(6, SPLIT)
    cluster.run()
    assert learned == ["p0", "d0"]
