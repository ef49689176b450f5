"""Virtual time: events in order of time, then of when they were asked for. Nothing else moves the clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Timer:
    """One event to come. `cancel` leaves its place in the heap; it does nothing when its time comes."""

    __slots__ = ("call", "value")

    def __init__(self, call: Callable[[Any], None] | None, value: Any) -> None:
        self.call = call
        self.value = value

    def cancel(self) -> None:
        self.call = None


class EventLoop:
    def __init__(self) -> None:
        self.now = 0.0
        self.events_total = 0
        self._heap: list[tuple[float, int, Timer]] = []
        self._number = 0

    def at(self, time_s: float, call: Callable[[Any], None], value: Any = None) -> Timer:
        """`call(value)` at `time_s`; a time that is past means now."""
        timer = Timer(call, value)
        self._number += 1
        heapq.heappush(self._heap, (time_s if time_s > self.now else self.now, self._number, timer))
        return timer

    def run(self, until_s: float = float("inf")) -> None:
        """Until nothing is left, or the next event is later than `until_s`."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_s:
            self.now, _, timer = pop(heap)
            call = timer.call
            if call is not None:
                self.events_total += 1
                call(timer.value)

    def stop(self) -> None:
        """Nothing of what was asked for happens any more."""
        self._heap.clear()

    def __len__(self) -> int:
        return len(self._heap)
