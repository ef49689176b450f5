"""Beam searches over a cluster in virtual time: what each answer says, what all of them cost, and what is left."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from engine.beams import BeamParams, BeamRule
from kv_transfer.layout import FULL, Rule
from router.placement.policy import Placement
from router.record.tracing import RequestTrace
from router.request import Beams, Finish, Request, Sampling
from tests.scenarios.model import ScriptedModel, mix, row_of
from tests.scenarios.scenario import SimClient, _answer_of
from tests.scenarios.test_forks import BLOCK, PROMPT, Cluster

SPLIT, LOCAL = Placement.SPLIT, Placement.LOCAL
BEAMS = Beams(4, 3, 0.8, "never")
PLACEMENTS = pytest.mark.parametrize("placement", [SPLIT, LOCAL])


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ScriptedModel, "searches", True)
    return


def expected(prompt: list[int], sampling: Sampling) -> list[list[int]]:
    beams = sampling.beams
    assert beams is not None
    params = BeamParams(beams.width, beams.answers, beams.length_penalty, beams.early_stopping)
    rule = BeamRule(params, frozenset(sampling.stop_token_ids), sampling.min_tokens, sampling.max_tokens)
    mark = 0
    for token in prompt:
        mark = mix(mark, token)
    marks = [mark]
    while not rule.over:
        marks = [mix(marks[beam], token) for beam, token in rule.step([row_of(mark) for mark in marks])]
    return [list(answer.token_ids) for answer in rule.answers()]


class Searching(Cluster):
    def search(
        self, placement: Placement, beams: Beams = BEAMS, max_tokens: int = 9, ends: tuple[int, ...] = (3,)
    ) -> list[SimClient]:
        now, number = self.clock.now, len(self.clients)
        prompt = [i * 7 % 900 for i in range(PROMPT)]
        sampling = Sampling(max_tokens, stop_token_ids=ends, beams=beams)
        asked: list[SimClient] = []
        for i, answer in enumerate(expected(prompt, sampling)):
            beside = asked[0].request.key if asked else ""
            name = f"q{number + i}"
            request = Request(name, prompt, sampling, now, now + 60.0, again=i > 0, beside=beside, answer=i)
            client = SimClient(number + i, request, placement, None, answer, clock=self.clock)
            self.router.dispatcher.dispatch(request, placement, client, RequestTrace(name, None))
            asked.append(client)
        self.clients += asked
        return asked

    def plain(self, placement: Placement, max_tokens: int, priority: int) -> list[SimClient]:
        now, number = self.clock.now, len(self.clients)
        request = Request(f"q{number}", [number * 11 % 900] * PROMPT, Sampling(max_tokens), now, now + 60.0, priority)
        client = SimClient(number, request, placement, None, _answer_of(request), clock=self.clock)
        self.router.dispatcher.dispatch(request, placement, client, RequestTrace(request.request_id, None))
        self.clients.append(client)
        return [client]

    def check(self) -> None:
        for c in self.clients:
            ends = c.tokens[-1:] == [3]
            if c.cancel_at is None and ends and c.finish is Finish.STOP:
                c.finish = Finish.LENGTH
        super().check()

    def until_running(self, sequences: int) -> None:
        """So many on a decode worker."""
        while max((w.core.load().running_sequences for w in self.decodes), default=0) < sequences:
            assert self.clock.now < 60.0
            self.clock.run(until=self.clock.now + 0.0005)


@PLACEMENTS
def test_all_answers_come_of_one_search(placement: Placement) -> None:
    cluster = Searching()
    answers = cluster.search(placement)
    cluster.run()
    assert len(answers) == 3
    tail = PROMPT - 2 * BLOCK
    split = placement is SPLIT
    assert cluster.computed == ({"p0": PROMPT, "d0": tail} if split else {"p0": 0, "d0": PROMPT})
    assert cluster.pulled_bytes == (3 * BLOCK * 8 if split else 0), "handed over once"
    assert [c.recoveries for c in answers] == [0, 0, 0]


@pytest.mark.parametrize("placement", [SPLIT, Placement.AUTO])
def test_windows(placement: Placement) -> None:
    cluster = Searching((FULL, Rule(window=8)))
    for worker in cluster.router.dispatcher.cluster.workers.values():
        object.__setattr__(worker.info, "fixed_bytes", 64)
    cluster.search(placement, Beams(3, 2), 20)
    cluster.run()
    assert [c.split for c in cluster.clients] == [placement is SPLIT] * 2


@PLACEMENTS
@pytest.mark.parametrize("max_tokens", [1, 2, 30])
def test_short_and_long_ones(placement: Placement, max_tokens: int) -> None:
    """A first token that would end an answer ends no search, wherever it is sampled."""
    cluster = Searching()
    cluster.search(placement, max_tokens=max_tokens, ends=tuple(range(6)))
    cluster.clients.clear()
    cluster.search(placement, Beams(3, 1), max_tokens)
    cluster.run()


@PLACEMENTS
@pytest.mark.parametrize("running", [0, 1, 3])
@pytest.mark.parametrize("name", ["p0", "d0"])
def test_a_worker_dies(placement: Placement, name: str, running: int) -> None:
    cluster = Searching(num_decode=2)
    cluster.search(placement)
    cluster.until_running(running)
    worker = cluster.world.worker(name)
    assert worker is not None
    worker.die()
    cluster.run()
    assert all(c.recoveries <= 1 for c in cluster.clients)


@PLACEMENTS
@pytest.mark.parametrize("running", [0, 1, 3])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_cancels(placement: Placement, running: int, which: tuple[int, ...]) -> None:
    cluster = Searching()
    answers = cluster.search(placement)
    cluster.until_running(running)
    cluster.cancel(*(answers[i] for i in which))
    cluster.run()
    assert [c.finish is Finish.CANCELLED for c in answers] == [i in which for i in range(3)]


@PLACEMENTS
def test_more_searches_than_there_is_room_for(placement: Placement) -> None:
    """Of 96 blocks each takes nearly half."""
    cluster = Searching()
    for _ in range(8):
        cluster.search(placement, Beams(7, 2), 40)
    cluster.run()


def test_a_search_that_fits_no_pool_is_an_explicit_error() -> None:
    cluster = Searching()
    (answer, *_) = cluster.search(LOCAL, Beams(16, 1), 200)
    cluster.clock.run(until=cluster.clock.now + 3.0)
    assert answer.failure is not None
    assert "KV blocks" in answer.failure.message
    cluster.clients.clear()
    cluster.check()


@pytest.mark.parametrize("seed", range(8))
def test_searches_among_others_on_a_cluster_that_fails(seed: int) -> None:
    """Ordinary answers beside them, a pool that is too small for all, cancels, and workers that die."""
    rng = random.Random(seed)
    cluster = Searching(num_decode=2)
    began = cluster.clock.now
    for _ in range(24):
        if rng.random() < 0.5:
            width = rng.randint(1, 7)
            beams = Beams(width, rng.randint(1, width), rng.uniform(-1, 2), rng.choice((True, False, "never")))
            asked = cluster.search(
                rng.choice((SPLIT, LOCAL)), beams, rng.randint(1, 40), (3,) if rng.random() < 0.5 else ()
            )
        else:
            asked = cluster.plain(rng.choice((SPLIT, LOCAL)), rng.randint(1, 500), rng.randint(-1, 9))
        if rng.random() < 0.2:
            cluster.cancel(*rng.sample(asked, rng.randint(1, len(asked))))
        cluster.clock.run(until=cluster.clock.now + rng.choice((0.0, 0.01, 0.2)))
        if rng.random() < 0.1 and len(cluster.decodes) > 1:
            rng.choice(cluster.decodes).die()
    cluster.run()
    assert cluster.clock.now - began < 31.0, "somebody stands still"
