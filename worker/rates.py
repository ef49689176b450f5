"""Recent speeds of a worker's own steps: what the router's estimates rest on."""

from __future__ import annotations

from engine.types import StepPlan

_WEIGHT = 0.2  # of the newest observation
_MIN_PREFILL_TOKENS = 16  # shorter chunks measure the step's fixed cost, not the rate


class StepRates:
    """Exponential means. A rate is 0 until something was observed."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.step_ms = 0.0
        self.prefill_tokens_per_s = 0.0
        self.decode_tokens_per_s = 0.0

    def observe(self, plan: StepPlan, duration_s: float) -> None:
        if duration_s <= 0:
            return
        prefill_tokens = sum(len(item.token_ids) for item in plan.items if len(item.token_ids) > 1)
        sampled = sum(item.sample for item in plan.items)
        self.step_ms = _mix(self.step_ms, duration_s * 1e3)
        if prefill_tokens >= _MIN_PREFILL_TOKENS:
            self.prefill_tokens_per_s = _mix(self.prefill_tokens_per_s, prefill_tokens / duration_s)
        elif sampled:
            self.decode_tokens_per_s = _mix(self.decode_tokens_per_s, sampled / duration_s)


def _mix(old: float, new: float) -> float:
    return new if old == 0 else old + _WEIGHT * (new - old)
