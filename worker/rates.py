"""Recent speeds of a worker's own steps: what the router's estimates rest on."""

from __future__ import annotations

from engine.types import PlanItem, StepPlan

_WEIGHT = 0.2  # of the newest observation
_MIN_PREFILL_TOKENS = 16  # shorter chunks measure the step's fixed cost, not the rate
_LEAST_OWN_SHARE = 0.25  # of a mixed step that is charged to its chunks at least


class StepRates:
    """Exponential means. A rate is 0 until something was observed."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.step_ms = 0.0
        self.decode_step_ms = 0.0
        self.prefill_tokens_per_s = 0.0
        self.decode_tokens_per_s = 0.0

    def observe(self, plan: StepPlan, duration_s: float, accepted: int = 0) -> None:
        """`accepted`: drafts that became tokens, besides the one of each item that samples."""
        if duration_s <= 0:
            return
        prefill_tokens = sum(len(item.token_ids) for item in plan.items if not _decodes(item))
        sampled = accepted + sum(item.sample for item in plan.items)
        self.step_ms = _mix(self.step_ms, duration_s * 1e3)
        if prefill_tokens >= _MIN_PREFILL_TOKENS:
            # Beside decodes a chunk is charged what it adds to their step: so the rate of a decode worker and that of
            # an idle prefill worker are the same thing.
            decodes = any(_decodes(item) for item in plan.items)
            own_s = max(duration_s * _LEAST_OWN_SHARE, duration_s - self.decode_step_ms / 1e3 * decodes)
            self.prefill_tokens_per_s = _mix(self.prefill_tokens_per_s, prefill_tokens / own_s)
        elif sampled:
            self.decode_tokens_per_s = _mix(self.decode_tokens_per_s, sampled / duration_s)
            if not prefill_tokens:
                self.decode_step_ms = _mix(self.decode_step_ms, duration_s * 1e3)

    def decode_ms_now(self, by_costs_ms: float) -> float:
        """What a step of the decodes that run now takes: by the learned costs where they are known (not 0). What was
        measured last is of other decodes: a worker whose long answers have ended would look slow until it has new ones.
        """
        return by_costs_ms if by_costs_ms and self.decode_step_ms else self.decode_step_ms


def _decodes(item: PlanItem) -> bool:
    return len(item.token_ids) - len(item.drafts) == 1


def _mix(old: float, new: float) -> float:
    return new if old == 0 else old + _WEIGHT * (new - old)
