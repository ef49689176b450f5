"""What the router hears of fast workers, late and in turns; and what is sampled of them for the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.placement.cluster import Cluster, Role
from simulator.flights import BLOCK_TOKENS, REPORT_SLOTS, FastWorker, Load, Sample, runs
from simulator.loop import EventLoop


class Reports:
    """`going`: whether anything is still to come."""

    def __init__(
        self,
        loop: EventLoop,
        cluster: Cluster,
        workers: Sequence[FastWorker],
        every_s: float,
        going: Callable[[], bool],
    ) -> None:
        self.loop, self.cluster, self.workers, self.every_s, self.going = loop, cluster, workers, every_s, going
        self.samples: list[Sample] = []

    def start(self, sample_every_s: float, slots: int = 0) -> None:
        """`slots`: for workers that are still to come; 0: for those that are here."""
        for slot in range(slots or min(REPORT_SLOTS, len(self.workers))):
            self.loop.at(slot * self.every_s / REPORT_SLOTS, self._report, slot)
        self._sample_every_s = sample_every_s
        if sample_every_s:
            self._last_busy = [0.0] * len(self.workers)
            self.loop.at(sample_every_s, self._sample)

    def _report(self, slot: int) -> None:
        for index in range(slot, len(self.workers), REPORT_SLOTS):
            worker = self.workers[index]
            engine, cache = worker.engine, worker.engine.cache
            if not engine.alive:
                continue
            engine.settle()
            stored, removed = cache.take_events()
            prefixes = self.cluster.prefixes
            if removed:
                prefixes.removed(worker.key, removed)
            for parent, names in runs(stored):
                prefixes.stored(worker.key, names, parent)
            cost = engine.learned.cost()
            load = Load(
                engine.running,
                len(engine.waiting),
                engine.backlog_tokens(),
                engine.context_tokens,
                cache.capacity_tokens // BLOCK_TOKENS,
                cache.free_tokens // BLOCK_TOKENS,
                0,
                engine.step_ms,
                engine.prefill_tokens_per_s,
                engine.decode_tokens_per_s,
                worker.pull_bytes_per_s,
                engine.decode_ms_now(),
                engine.chunk_tokens(),
                (engine.waiting_tokens() + worker.held_tokens) // BLOCK_TOKENS,
                worker.newest_leg,
                cost.constant_ms,
                cost.per_sequence_ms,
                cost.per_token_ms,
                cost.per_context_token_ms,
                cost.per_attention_pair_ms,
                engine.learned.relative_error,
            )
            if load != worker.said:  # as workers do: no news, no message
                worker.said = load
                self.cluster.reported(worker.key, load, self.loop.now)
        if self.going():
            self.loop.at(self.loop.now + self.every_s, self._report, slot)

    def _sample(self, _: object) -> None:
        busy = [w.engine.busy_s for w in self.workers]
        gained = [(b - a) / self._sample_every_s for a, b in zip(self._last_busy, busy, strict=True)]
        self._last_busy = busy
        of = {
            role: [g for g, w in zip(gained, self.workers, strict=True) if w.role is role]
            for role in (Role.PREFILL, Role.DECODE)
        }
        decodes = [w.engine for w in self.workers if w.role is Role.DECODE]
        self.samples.append(
            Sample(
                self.loop.now,
                _mean(of[Role.PREFILL]),
                _mean(of[Role.DECODE]),
                sum(e.running for e in decodes),
                sum(w.engine.backlog_tokens() for w in self.workers),
                _mean([1 - e.cache.free_tokens / e.cache.capacity_tokens for e in decodes]),
            )
        )
        if self.going():
            self.loop.at(self.loop.now + self._sample_every_s, self._sample)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
