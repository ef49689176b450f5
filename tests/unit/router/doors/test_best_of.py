"""Which of several answers are given."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from router.doors.http.answer import Answer
from router.doors.http.generate import best


def answered(*logprobs: list[float]) -> Any:
    """A choice for each; no answer has text."""

    async def made() -> Answer:
        shape: Any = None
        return Answer(shape, len(logprobs), False, 1000)

    choices = asyncio.run(made()).choices
    for choice, values in zip(choices, logprobs, strict=True):
        for position, value in enumerate(values):
            choice.token(position, 7, "", SimpleNamespace(logprob=value, top=()))
    return choices


def test_the_likeliest_by_token_come_first() -> None:
    """The third is less likely as a whole, because it is longer."""
    choices = answered([-2.0], [-0.5, -0.7], [-0.1] * 20, [-3.0, -0.1])
    assert best(choices, 4, 2) == [choices[2], choices[1]]
    assert [choices[2].index, choices[1].index] == [0, 1]


def test_each_prompt_has_its_own() -> None:
    choices = answered([-2.0], [-1.0], [-9.0], [-8.0])
    chosen = best(choices, 2, 1)
    assert chosen == [choices[1], choices[3]]
    assert [c.index for c in chosen] == [0, 1]


def test_what_is_impossible_comes_last() -> None:
    choices = answered([-1.0, float("-inf")], [-50.0, -50.0])
    assert best(choices, 2, 1) == [choices[1]]


def test_all_of_them_stay_as_they_came() -> None:
    choices = answered([-2.0], [-1.0])
    assert best(choices, 2, 2) is choices
