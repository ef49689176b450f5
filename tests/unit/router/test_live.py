"""What first placements teach about others."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from router.legs import Timeline
from router.live import Live, learn_early
from router.placement.policy import Route, WorkerKey
from router.request import Request, Sampling

REQUEST = Request("r", [1, 2], Sampling(8), 0.0, 60.0)
ESTIMATES = {"uncorrected_ttft_ms": 100.0, "uncorrected_handoff_ms": 10.0, "backlog_ms": 0.0}


def live(request: Request) -> Live:
    nobody: Any = None
    route = Route(WorkerKey("d", 1), WorkerKey("p", 1), "test", ESTIMATES)
    times = Timeline(dispatched=1.0, first_token=1.2)
    life: Any = SimpleNamespace(request=request, route=route, moved=False, times=times)
    return Live(life, nobody, nobody, nobody)


def learned(live: Live) -> list[tuple[str, float]]:
    """From the first token, and from its handover."""
    noted: list[tuple[str, float]] = []
    cluster: Any = SimpleNamespace(
        learned_ttft=lambda key, expected, actual, *_: noted.append((key.worker_id, round(actual))),
        learned_handoff=lambda key, expected, actual, *_: noted.append((key.worker_id, round(actual))),
    )
    learn_early(live, cluster, 1.2)
    learn_early(live, cluster, 1.25)
    return noted


def test_each_placement_teaches_once() -> None:
    one = live(REQUEST)
    assert learned(one) == [("p", 200), ("d", 50)]
    assert learned(one) == []


def test_an_answer_that_waited_for_its_prompt_teaches_nothing() -> None:
    first, further = live(REQUEST), live(replace(REQUEST, again=True, beside="r"))
    further.wait_for(first)
    assert first.waiting == [further]
    assert learned(further) == []
    assert learned(first) == [("p", 200), ("d", 50)]


@pytest.mark.parametrize(("emitted", "teaches"), [((), False), ((5,), True)])
def test_a_prompt_that_is_scored_teaches_nothing(emitted: tuple[int, ...], teaches: bool) -> None:
    scored = replace(REQUEST, sampling=Sampling(8, prompt_logprobs=0), emitted=emitted)
    assert bool(learned(live(scored))) is teaches
