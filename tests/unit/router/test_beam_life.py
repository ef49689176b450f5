"""A search's answers, message by message, and what they count."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from router.beam_life import BeamLife, life_of
from router.legs import RecoveryLimits
from router.placement.mixing import Mixing
from router.placement.policy import Route
from router.request import Beams, Finish, Request, Sampling
from tests.unit.router.test_lifecycle import D, PlainText, Story

ASKED = Request("r", [1, 2, 3], Sampling(5, beams=Beams(16, 2)), arrived=0.0, deadline=10.0)


def life(story: Story, answer: int) -> BeamLife:
    made: Any = life_of(ASKED)(
        replace(ASKED, answer=answer, again=answer > 0),
        Route(D, None, "test", {}),
        workers=story,
        client=story,
        text=PlainText(),
        leg_numbers=itertools.count(1),
        handoff_prefix="r",
        planner=story,
        limits=RecoveryLimits(3, wait_s=1.0),
    )
    assert isinstance(made, BeamLife)
    return made


def test_the_others_say_which_weights_have_mixed_in_their_search() -> None:
    story = Story(split=False)
    first, second = life(story, 0), life(story, 1)
    first.start(0.0)
    first.breakdown.mix = Mixing(schemes=("fp8", "bf16"))
    answers = [SimpleNamespace(token_ids=bytes([n, 0, 0, 0]), stopped=True) for n in (7, 8)]
    first.on_beams(1, SimpleNamespace(answers=answers))
    first.on_end(1, Finish.STOP, 0, 1.0)
    second.given(first, 1.0)
    assert [one.emitted for one in (first, second)] == [[7], [8]]
    assert second.breakdown.mix.mixed == ("fp8", "bf16")
    assert second.breakdown.mix is not first.breakdown.mix


def test_all_beams_count_for_the_limits_of_a_key() -> None:
    further = replace(ASKED, again=True)
    assert (ASKED.counted(5), further.counted(5)) == (3 + 15 * 5, 5), "16 beams, and the prompt"
    assert replace(ASKED, sampling=Sampling(5, beams=Beams(16, 1))).counted(5) == 3 + 16 * 5
    assert replace(ASKED, sampling=Sampling(5)).counted(5) == 8
