"""A request that wants log-probabilities of its prompt: no answer without them, whoever is quick, slow or lost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from diptych.v1 import generate_pb2

from router.legs import RecoveryLimits
from router.placement.policy import Route
from router.prompt_logprobs import PromptLogprobs
from router.request import Finish, Request, Sampling
from router.scored_life import ScoredLife, life_of
from tests.unit.router.test_lifecycle import D2, D, P, PlainText, Story, local

PROMPT = [5, 6, 7, 8]


def part(position: int, *own: float, alternatives: int = 1) -> generate_pb2.PromptLogprobs:
    return generate_pb2.PromptLogprobs(
        position=position,
        logprobs=own,
        ranks=[2] * len(own),
        alternatives=alternatives,
        top_token_ids=[9] * len(own) * alternatives,
        top_logprobs=[-0.5] * len(own) * alternatives,
    )


ALL = part(1, -1.0, -2.0, -3.0)


def scored(*, max_tokens: int = 5, emitted: tuple[int, ...] = (), **options: Any) -> tuple[Story, Any]:
    s = Story(max_tokens=max_tokens, **options)
    sampling = Sampling(max_tokens=max_tokens, prompt_logprobs=1)
    request = Request("r", PROMPT, sampling, arrived=0.0, deadline=10.0, emitted=emitted)
    route = Route(D, P if s.split else None, "test", {})
    s.life = life_of(request)(
        request,
        route,
        workers=s,
        client=s,
        text=PlainText(),
        leg_numbers=itertools.count(1),
        handoff_prefix="r",
        planner=s,
        limits=RecoveryLimits(s.max_attempts, wait_s=1.0),
    )
    s.life.start(0.1)
    s.new()
    return s, s.life


def own(scores: PromptLogprobs) -> list[float]:
    return scores.scores().own.tolist()


def test_they_come_in_chunks_before_the_first_token() -> None:
    s, life = scored()
    scores = life.prompt_logprobs
    life.on_prompt_logprobs(2, part(1, -1.0), 0.9)
    life.on_prompt_logprobs(2, part(2, -2.0, -3.0), 1.0)
    life.on_token(2, 0, 70, None, 1.0)
    life.on_end(2, None, 0, 1.0)
    life.on_adopted(1, "r/2", 0.8, 3.0, 1.0)
    life.on_token(1, 0, 70, None, 1.1)
    life.on_end(1, Finish.LENGTH, 0, 1.3)
    assert s.new() == ["client: 0=70", "client: finished length"]
    assert own(scores) == [-1, -2, -3]
    assert life.prompt_logprobs is None, "whoever wants them has them"
    s.assert_over()


def test_a_decode_worker_that_is_quicker_waits_for_them() -> None:
    s, life = scored(max_tokens=2)
    life.on_prompt_logprobs(2, part(1, -1.0), 0.9)
    life.on_adopted(1, "r/2", 0.8, 3.0, 1.0)
    life.on_token(1, 0, 70, None, 1.0)
    life.on_token(1, 1, 71, None, 1.1)
    life.on_end(1, Finish.LENGTH, 0, 1.1)
    assert s.new() == []
    life.on_prompt_logprobs(2, part(2, -2.0, -3.0), 1.2)
    assert s.new() == ["client: 0=70", "client: 1=71", "cancel 2 on p", "client: finished length"]
    s.assert_over()


def test_a_source_that_is_lost_with_them_has_the_prompt_computed_again() -> None:
    """Decode has its KV and could go on; but what nobody heard it cannot say."""
    s, life = scored(elsewhere=[local(D2)])
    life.on_prompt_logprobs(2, part(1, -1.0), 0.9)
    life.on_adopted(1, "r/2", 0.8, 3.0, 1.0)
    life.on_token(1, 0, 70, None, 1.0)
    life.on_worker_lost(2, "killed", 1.1)
    assert s.new() == ["cancel 1 on d", "start 3 on d2: local"]
    life.on_token(1, 1, 71, None, 1.1)
    life.on_prompt_logprobs(3, part(1, -1.5, -2.5), 1.2)
    life.on_prompt_logprobs(3, part(3, -3.5), 1.2)
    life.on_token(3, 0, 70, None, 1.3)
    assert s.new() == ["client: 0=70"]
    assert own(life.prompt_logprobs) == [-1, -2.5, -3.5], "what had come stays"


@pytest.mark.parametrize("heard", [False, True])
def test_a_source_that_is_lost_before_adoption_lets_decode_compute(heard: bool) -> None:
    s, life = scored()
    if heard:
        life.on_prompt_logprobs(2, ALL, 0.9)
    life.on_worker_lost(2, "killed", 1.0)
    assert s.new() == ["continue 1 on d with []"]
    life.on_prompt_logprobs(1, ALL, 1.1)
    life.on_token(1, 0, 70, None, 1.1)
    assert s.new() == ["client: 0=70"]


def test_once_they_are_there_nothing_is_different() -> None:
    s, life = scored(elsewhere=[local(D2)], split=False)
    life.on_prompt_logprobs(1, ALL, 0.9)
    life.on_token(1, 0, 70, None, 1.0)
    life.on_worker_lost(1, "killed", 1.1)
    assert s.new() == ["client: 0=70", "start 2 on d2: local after [70]"]
    life.on_token(2, 1, 71, None, 1.2)
    assert s.new() == ["client: 1=71"]


def test_a_first_token_without_them_is_not_taken() -> None:
    s, life = scored(split=False, elsewhere=[local(D2)])
    life.on_token(1, 0, 70, None, 1.0)
    assert s.new() == ["cancel 1 on d", "start 2 on d2: local"]


@pytest.mark.parametrize(
    "wrong",
    [part(2, -1.0), part(0, -1.0), part(1, *[-1.0] * 4), part(1, -1.0, alternatives=2)],
    ids=["a gap", "the first token", "too many", "other alternatives"],
)
def test_what_does_not_fit_fails_its_leg(wrong: generate_pb2.PromptLogprobs) -> None:
    s, life = scored(split=False, elsewhere=[local(D2)])
    life.on_prompt_logprobs(1, wrong, 1.0)
    assert s.new() == ["cancel 1 on d", "start 2 on d2: local"]


def test_without_a_token_the_end_brings_them() -> None:
    s, life = scored(split=False, max_tokens=0)
    assert not life.over
    life.on_prompt_logprobs(1, ALL, 1.0)
    life.on_end(1, Finish.LENGTH, 0, 1.0)
    assert s.new() == ["client: finished length"]
    s.assert_over()


def test_a_resumed_answer_has_had_them() -> None:
    s, life = scored(emitted=(70,), split=False)
    assert type(life) is not ScoredLife
    life.on_prompt_logprobs(1, ALL, 1.0)
    life.on_token(1, 1, 71, None, 1.0)
    assert s.new() == ["client: 1=71"]


def test_a_prompt_of_one_token_has_none() -> None:
    assert PromptLogprobs(1, 5).scores().ids.shape == (0, 5)
