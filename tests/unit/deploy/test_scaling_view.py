"""`diptych explain scaling` in words."""

from __future__ import annotations

import json
import math
from typing import Any

from diptych.v1 import cluster_pb2, scaling_pb2

from deploy.scaling_view import all_to_dict, render


def decision(number: int, age_s: float, rule: str, pairs: str, outcome: str = "applied", **more: Any) -> Any:
    outcomes = {
        "dry run": scaling_pb2.SCALING_OUTCOME_DRY_RUN,
        "unchanged": scaling_pb2.SCALING_OUTCOME_UNCHANGED,
        "applied": scaling_pb2.SCALING_OUTCOME_APPLIED,
        "failed": scaling_pb2.SCALING_OUTCOME_FAILED,
    }
    before, after = (
        scaling_pb2.ScalingCounts(prefill=int(p), decode=int(d))
        for p, d in (pair.split("+") for pair in pairs.split(">"))
    )
    given: dict[str, Any] = {"reason": f"because of {rule}", **more}
    return scaling_pb2.ScalingDecision(
        decider="serve", number=number, age_ms=age_s * 1e3, interval_s=5.0, before=before, after=after, ready=before,
        rule=rule, outcome=outcomes[outcome], **given,
    )  # fmt: skip


def answer(*decisions: Any) -> cluster_pb2.GetScalingResponse:
    return cluster_pb2.GetScalingResponse(decisions=decisions, current=decisions[0], decisions_total=len(decisions))


def test_what_was_decided_when_why_and_against_what() -> None:
    numbers = {"held_gpus": 4.0, "budget_gpus": 8.0, "start_s": 45.0, "prefill_load_ahead": 2.41}
    weighed = [
        scaling_pb2.ScalingAlternative(
            prefill=2, decode=2, prefill_strain=1.21, decode_strain=0.5, what="nothing", verdict="short"
        )
    ]
    why = "strain 1.21 within 50 s, no shift mends it: 1 started; more would be wanted, and the budget is 8 GPUs"
    now = decision(9, 3.0, "start", "2+2>3+2", reason=why, numbers=numbers, alternatives=weighed)
    steady = [decision(8 - i, 8.0 + 5 * i, "steady", "2+2>2+2", "unchanged") for i in range(3)]
    refused = decision(5, 23.0, "stop", "3+2>2+2", "failed", error="no application of this name")
    words = render(answer(now, *steady, refused), 8, 80, wall_now=1e9)
    lines = words.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:2] == [
        "3 prefill and 2 decode workers are wanted, 2 and 2 were ready; 4 of 8 GPUs held",
        "decided by serve, every 5 s; last 3 s ago",
    ]
    first = next(i for i, line in enumerate(lines) if "2 + 2 → 3 + 2" in line)
    assert lines[first].split()[0].count(":") == 2
    assert lines[first].endswith("start, applied")
    assert "2.41  load of prompts ahead, workers" in words
    assert "2 + 2  prompts 1.21, answers 0.50  nothing in 0 s: short" in words
    assert " ".join(words.split()).count(why) == 1
    before = lines.index("before")
    assert "steady, 3 times since" in lines[before + 1], "what says the same is said once"
    assert lines[before + 3].endswith("3 + 2 → 2 + 2  stop, failed")
    assert "error: no application of this name" in words


def test_of_many_only_the_last_are_told() -> None:
    words = render(answer(*(decision(9 - i, 5.0 * i, f"rule {i}", "1+1>1+2") for i in range(5))), 2, 100, 1e9)
    assert "before, the last 2 (--last for more)" in words
    assert "rule 2" in words
    assert "rule 3" not in words


def test_as_json_there_is_no_infinity() -> None:
    """A pool without workers is strained without bound."""
    weighed = [scaling_pb2.ScalingAlternative(prefill=0, decode=2, prefill_strain=math.inf, what="stop")]
    told = answer(decision(1, 1.0, "steady", "1+2>1+2", "unchanged", alternatives=weighed))
    data = json.loads(json.dumps(all_to_dict(told, 8), allow_nan=False))
    assert data["decisions"][0]["alternatives"][0]["prefill_strain"] is None
    assert data["current"]["outcome"] == "unchanged"
    assert all_to_dict(cluster_pb2.GetScalingResponse(), 8)["current"] is None
