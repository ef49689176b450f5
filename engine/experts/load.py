"""How evenly tokens are spread over the experts, as an operator sees it.

Each layer counts the rows that each of its experts has had, where it computes: nothing waits for a device. Whoever
wants to know reads the counts then. On a GPU the counts of a recorded step include its padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_WINDOW_S = 60.0


class ExpertLoad:
    """`layers`: of each, rows by expert since start, int64, where the layer computes. Read by one thread at a time.

    `ends`: where experts are split over groups of ranks, the first expert of each next group, by layer.
    """

    def __init__(
        self, layers: Sequence[torch.Tensor], names: Sequence[str] = (), ends: Sequence[Sequence[int]] = ()
    ) -> None:
        self._ends = tuple(tuple(each) for each in ends)
        self.names = tuple(names)  # what each layer's experts run on
        self._layers = tuple(layers)
        self._older = self._newer = [torch.zeros(len(counts), dtype=torch.int64) for counts in layers]
        self._newer_at = 0.0

    def routed(self) -> int:
        """Rows that experts have had since start: tokens x layers x choices."""
        return sum(int(counts.sum()) for counts in self._layers)

    def by_group(self) -> dict[str, int]:
        """Of `routed`, what each group of ranks had; empty where experts are not split over any."""
        found: dict[str, int] = {}
        for counts, ends in zip(self._layers, self._ends, strict=False):
            for group, part in enumerate(counts.tensor_split(list(ends))):
                found[str(group)] = found.get(str(group), 0) + int(part.sum())
        return found

    def imbalance(self, now: float) -> float:
        """Of the layer that is worst off: rows of its busiest expert over the mean of all, within the last one to two
        minutes. 1 is even; 0 where nothing was routed.
        """
        counts = [counts.cpu().clone() for counts in self._layers]
        if now - self._newer_at >= _WINDOW_S:
            self._older, self._newer, self._newer_at = self._newer, counts, now
        worst = 0.0
        for new, old in zip(counts, self._older, strict=True):
            rows = (new - old).float()
            if rows.sum() > 0:
                worst = max(worst, (rows.max() / rows.mean()).item())
        return worst
