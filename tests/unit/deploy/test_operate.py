"""What `diptych scale` says of workers that are to be started."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from diptych.v1 import cluster_pb2, scaling_pb2

from deploy import operate


def decision(number: int, before: tuple[int, int], after: tuple[int, int], reason: str) -> scaling_pb2.ScalingDecision:
    counts = [scaling_pb2.ScalingCounts(prefill=p, decode=d) for p, d in (before, after, (1, 2))]
    return scaling_pb2.ScalingDecision(
        decider="scaler", number=number, before=counts[0], after=counts[1], ready=counts[2], reason=reason
    )


def test_the_reason_is_that_of_the_decision_that_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks late finds decisions that speak of other things."""
    made = [
        decision(6, (1, 2), (1, 2), "as it is"),
        decision(7, (9, 2), (2, 2), "a budget of 4 GPUs"),
        decision(8, (2, 2), (1, 2), "fewer would do"),
        decision(9, (1, 2), (1, 2), "as it is"),
    ]
    asked: list[int] = []

    def scaling(channel: Any, last: int) -> cluster_pb2.GetScalingResponse:
        asked.append(last)
        now = made[0] if len(asked) == 1 else made[-1]
        return cluster_pb2.GetScalingResponse(current=now, decisions=reversed(made))

    monkeypatch.setattr(operate, "get_scaling", scaling)
    monkeypatch.setattr(operate, "_LOOK_S", 0.0)
    ready, why_not = operate._grown({"prefill": 9}, "the scaler", "127.0.0.1:1", 10.0)
    assert ready["decode"] == 2
    assert why_not == "scaler goes for prefill=2 decode=2: a budget of 4 GPUs; see `diptych explain scaling`"


def test_a_request_that_no_router_has_is_said_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(*_: Any) -> None:
        raise operate.RequestFailed("NOT_FOUND", "no request req-1 runs here")

    monkeypatch.setattr(operate, "migrate", nobody)
    with pytest.raises(typer.Exit):
        operate.migrate_command("req-1", "decode-1", "127.0.0.1:1,127.0.0.1:2")
    assert "NOT_FOUND: no request req-1 runs here" in "".join(capsys.readouterr())
