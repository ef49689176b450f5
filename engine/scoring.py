"""From a step's logits to the log-probabilities of prompts' own tokens (engine/prompt_logprobs.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from engine.prompt_logprobs import PromptLogprobs
from engine.sampler import CAUSES, NO_LOGITS, best_ids, fetched
from engine.types import Failed, PlanItem, StepResult

_SLICE_BYTES = 8 << 20  # of float32: so much at a time, and what it is sorted by, stands beside the logits


class _Part:
    """One item's. `rows` of the packed row; `place` in the plan."""

    def __init__(self, item: PlanItem, place: int, last_row: int) -> None:
        assert item.prompt_logprobs is not None
        self.place = place
        self.position = item.start + 1
        self.count = min(item.start + len(item.token_ids), item.prompt_len - 1) - item.start
        first = last_row - len(item.token_ids) + 1
        self.rows = range(first, first + self.count)
        self.targets = np.asarray(item.history[self.position : self.position + self.count], dtype=np.int64)
        self.alternatives = item.prompt_logprobs
        self.found: list[tuple[torch.Tensor, ...]] = []


class Scoring:
    """Of one step: its `rows` are to be kept behind those that are sampled from."""

    @classmethod
    def of(cls, items: Sequence[PlanItem], places: Sequence[int], last_rows: Sequence[int]) -> Scoring | None:
        """None: nobody wants any. `items` in the order of the packed row, `places` theirs in the plan."""
        wanted = [i for i, item in enumerate(items) if item.prompt_logprobs is not None]
        return cls([_Part(items[i], places[i], last_rows[i]) for i in wanted]) if wanted else None

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts
        self.rows = [row for part in self._parts for row in part.rows]

    def launch(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` of all rows that were kept, of any float type; returns the others'. On CUDA nothing here waits."""
        others = logits[: len(logits) - len(self.rows)]
        first, rows = len(others), max(1, _SLICE_BYTES // (4 * logits.shape[-1]))
        for part in self._parts:
            targets = torch.from_numpy(part.targets)
            if logits.is_cuda:
                targets = targets.pin_memory().to(logits.device, non_blocking=True)
            for at in range(0, part.count, rows):
                end = min(at + rows, part.count)
                part.found.append(_scored(logits[first + at : first + end], targets[at:end], part.alternatives))
            first += part.count
        return others.clone()  # these few wait for their sampling, and must not keep the others from being freed

    def added_to(self, result: StepResult) -> StepResult:
        found, failed = self.read()
        return replace(result, prompt_logprobs=found, failures={**result.failures, **failed})

    def read(self) -> tuple[dict[int, PromptLogprobs], dict[int, Failed]]:
        """By place in the plan; when the device is done."""
        found: dict[int, PromptLogprobs] = {}
        failed: dict[int, Failed] = {}
        for part in self._parts:
            own, ranks, ids, values = (
                np.concatenate([tensor.numpy() for tensor in column]) for column in zip(*part.found, strict=True)
            )
            if np.isnan(own).any():
                at = part.position + int(np.isnan(own).argmax())
                failed[part.place] = Failed(CAUSES[NO_LOGITS].format(f"{at} of the prompt"))
                continue
            found[part.place] = PromptLogprobs(
                part.position, own, ranks.astype(np.uint32), ids.astype(np.uint32), values
            )
        return found, failed


def _scored(logits: torch.Tensor, targets: torch.Tensor, alternatives: int) -> tuple[torch.Tensor, ...]:
    """Own log-probabilities, ranks, the best alternatives and their log-probabilities; on their way to the host."""
    distribution = torch.log_softmax(logits.float(), dim=-1)
    own = distribution.gather(-1, targets[:, None])
    ranks = (distribution >= own).sum(-1)
    ids = best_ids(distribution, alternatives) if alternatives else targets.new_empty((len(targets), 0))
    values = distribution.gather(-1, ids)
    return fetched(own[:, 0]), fetched(ranks), fetched(ids), fetched(values)
