"""What the machine could do at best, measured beside what an engine does."""

from __future__ import annotations

import time

import torch


class ReadBandwidth:
    """Bytes a second that torch's threads read from one buffer, which stays the same.

    A sum of float32 was the quickest of six readers tried (sums and maxima of two types, matrix products). A buffer
    below the size of the last-level cache measures the cache: give it the size of what the engine reads.
    """

    def __init__(self, num_bytes: int) -> None:
        self._buffer = torch.ones(num_bytes // 4)

    def bytes_per_s(self, reads: int = 5) -> float:
        """The quickest of `reads`: a ceiling, not a mean."""
        self._buffer.sum()
        times = []
        for _ in range(reads):
            begun = time.perf_counter()
            self._buffer.sum()
            times.append(time.perf_counter() - begun)
        return self._buffer.numel() * 4 / min(times)
