"""Weights of adapters in host memory, the most recently used ones up to a bound: a slot is filled from here.

Who reads an adapter puts it here, off the step thread; a step takes it.
"""

from __future__ import annotations

import threading

from engine.adapters.format import Pairs


class KeptWeights:
    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._kept: dict[str, Pairs] = {}  # by digest, least recently used first
        self.held_bytes = 0

    def put(self, digest: str, pairs: Pairs) -> None:
        size = _bytes_of(pairs)
        if size > self._most_bytes:
            return
        with self._lock:
            self._drop(digest)
            self._kept[digest] = pairs
            self.held_bytes += size
            while self.held_bytes > self._most_bytes:
                self._drop(next(iter(self._kept)))

    def has_room(self, pairs: Pairs) -> bool:
        """Without dropping others."""
        return self.held_bytes + _bytes_of(pairs) <= self._most_bytes

    def take(self, digest: str) -> Pairs | None:
        """It stays."""
        with self._lock:
            pairs = self._kept.pop(digest, None)
            if pairs is not None:
                self._kept[digest] = pairs
            return pairs

    def drop(self, digest: str) -> None:
        with self._lock:
            self._drop(digest)

    def _drop(self, digest: str) -> None:
        pairs = self._kept.pop(digest, None)
        if pairs is not None:
            self.held_bytes -= _bytes_of(pairs)


def _bytes_of(pairs: Pairs) -> int:
    return sum(t.numel() * t.element_size() for pair in pairs.values() for t in pair)
