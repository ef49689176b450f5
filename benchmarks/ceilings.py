"""What the machine could do at best, measured beside what an engine does."""

from __future__ import annotations

import statistics
import time

import torch

from engine.kv_shape import zeroed
from engine.native.library import load_library
from engine.native.processors import chosen


class ReadBandwidth:
    """Bytes a second that the native kernels' own threads read from one buffer, which stays the same (diptych_read).

    On large pages, in pieces of 64 KiB, nothing computed but a sum. torch's quickest reader gave less than half of it.
    A buffer below the size of the last-level cache measures the cache: give it the size of what the engine reads.
    """

    def __init__(self, num_bytes: int, threads: int) -> None:
        self._library = load_library(threads, chosen("auto", threads))
        self._buffer = zeroed((num_bytes // 4,), torch.float32, torch.device("cpu")).fill_(1)

    def bytes_per_s(self, reads: int = 9) -> float:
        """The median of `reads`, as steps are medians: memory's speed may change by tens of percent within seconds."""
        self._library.read(self._buffer)
        times = []
        for _ in range(reads):
            begun = time.perf_counter()
            self._library.read(self._buffer)
            times.append(time.perf_counter() - begun)
        return self._buffer.numel() * 4 / statistics.median(times)


class ProductPeak:
    """Operations a second of products of registers on the native kernels' own threads (engine/native/peak.h).

    Two for each multiplication with addition, as kernels count them. `isa` as load_library has it. 0: not known here.
    """

    def __init__(self, dtype: torch.dtype, threads: int, isa: str = "") -> None:
        self._library, self._dtype = load_library(threads, chosen("auto", threads), isa), dtype

    def flops_per_s(self, tries: int = 9, rounds: int = 20_000) -> float:
        """The best of `tries`, each of about a millisecond: a processor that is disturbed has not shown its peak."""
        best = 0.0
        for _ in range(tries):
            begun = time.perf_counter()
            done = self._library.products_of_registers(self._dtype, rounds)
            best = max(best, done / (time.perf_counter() - begun))
        return best
