"""What a worker has done since it started, as plain numbers: written by the engine thread, read by whoever looks."""

from __future__ import annotations

from dataclasses import dataclass

from engine.types import StepPlan


@dataclass(slots=True)
class WorkerCounts:
    """Tokens and seconds of steps by what they were for: prompt tokens (input), sampled tokens (output)."""

    input_tokens: int = 0
    output_tokens: int = 0
    input_busy_s: float = 0.0
    output_busy_s: float = 0.0

    def step(self, plan: StepPlan, duration_s: float, accepted: int = 0) -> str:
        """Returns what kind of step it was: prefill, decode or mixed. A step's time is shared out by tokens: of
        prompts, and one of each sequence that decodes, whatever became of its drafts (`accepted` are tokens, too).
        """
        prompt = decoded = 0
        for item in plan.items:
            count = len(item.token_ids) - len(item.drafts)
            if count > 1:
                prompt += count
            else:
                decoded += 1
        self.input_tokens += prompt
        self.output_tokens += decoded + accepted
        share = prompt / (prompt + decoded)
        self.input_busy_s += share * duration_s
        self.output_busy_s += (1.0 - share) * duration_s
        return "prefill" if not decoded else "decode" if not prompt else "mixed"
