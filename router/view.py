"""What a decision sees: one view of all workers, kept up to date event by event, never built anew for a request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, overload

from router.correction import UNCORRECTED, Corrected

# Used until a worker has measured its own. Deliberately modest: they hold for the first requests only.
_PREFILL_TOKENS_PER_S = 1000.0
_PULL_BYTES_PER_S = 1e9
_LONGEST_DRAIN_MS = 1000.0  # a report older than that says nothing about now


@dataclass(frozen=True, slots=True, order=True)
class WorkerKey:
    """One incarnation of a worker."""

    worker_id: str
    epoch: int

    def __hash__(self) -> int:
        return hash(self.worker_id)  # the string knows its own; a decision looks up a hundred keys


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker: its last report, what this router has promised since, and what its estimates were worth lately."""

    key: WorkerKey
    total_blocks: int
    free_blocks: int  # less what is promised, to sequences that wait there and to what is on its way
    block_tokens: int
    block_bytes: int
    backlog_tokens: int  # prompt tokens that it reported, at `reported_at`
    running_sequences: int  # with those on their way
    step_ms: float
    prefill_tokens_per_s: float  # 0: not measured yet
    pull_bytes_per_s: float
    layout_fingerprint: str = ""
    promised_tokens: int = 0  # prompt tokens on their way, not in `backlog_tokens`
    reported_at: float | None = None  # on the clock of `now`; None: count the backlog in full
    arriving_sequences: int = 0  # of the running ones: not in the report yet
    decode_step_ms: float = 0.0  # of steps without prompts; 0: not measured, `step_ms` stands in
    chunk_tokens: int = 0  # of prompts in one step beside decodes, at most; 0: no limit known
    queued_out_bytes: int = 0  # KV that handoffs have still to take from here
    queued_in_bytes: int = 0  # KV that is still to come here
    step_constant_ms: float = 0.0  # what prompts cost by the worker's own learned steps; `token_ms` 0: by the rate
    token_ms: float = 0.0
    pair_ms: float = 0.0  # for each pair of a new token and an earlier one
    ttft: Corrected = UNCORRECTED
    transfer: Corrected = UNCORRECTED
    step: Corrected = UNCORRECTED
    last_split: bool | None = None  # what was decided last, where this is the decode worker

    @property
    def prefill_rate(self) -> float:
        return self.prefill_tokens_per_s or _PREFILL_TOKENS_PER_S

    @property
    def pull_rate(self) -> float:
        return self.pull_bytes_per_s or _PULL_BYTES_PER_S

    def prefill_ms(self, tokens: float, held: int = 0) -> float:
        """Of `tokens` after `held` ones, alone on the worker."""
        if self.token_ms:
            steps = -(-tokens // self.chunk_tokens) if self.chunk_tokens else 1
            return steps * self.step_constant_ms + tokens * (self.token_ms + self.pair_ms * (held + tokens / 2))
        return tokens / (self.prefill_tokens_per_s or _PREFILL_TOKENS_PER_S) * 1e3

    def isolated_ms(self, tokens: float) -> float:
        """The same with nothing cached and without decodes beside it that keep its chunks short."""
        if self.token_ms:
            return self.step_constant_ms + tokens * (self.token_ms + self.pair_ms * tokens / 2)
        return tokens / (self.prefill_tokens_per_s or _PREFILL_TOKENS_PER_S) * 1e3

    def wait_ms(self, now: float) -> float:
        """Until a prompt that comes now has its turn: what was reported, less what was computed since, and promises."""
        rate = self.prefill_tokens_per_s or _PREFILL_TOKENS_PER_S
        waiting = self.backlog_tokens / rate * 1e3
        if waiting and self.reported_at is not None:
            waiting = max(0.0, waiting - min(_LONGEST_DRAIN_MS, max(0.0, (now - self.reported_at) * 1e3)))
        return waiting + self.promised_tokens / rate * 1e3

    def itl_ms(self) -> float:
        """Step time of its decodes with one sequence more, corrected."""
        raw = self.raw_itl_ms()
        return self.step(raw) if raw else 0.0

    def raw_itl_ms(self) -> float:
        """Half of a step is taken to be shared by all (weights), the other half to grow with the sequences."""
        step = self.decode_step_ms or self.step_ms
        reported = max(1, self.running_sequences - self.arriving_sequences)
        return step * (0.5 + 0.5 * max(reported, self.running_sequences + 1) / reported)


class Pool(Sequence[WorkerView]):
    """The ready workers of one role, in no order."""

    __slots__ = ("_places", "_views")

    def __init__(self, views: Iterable[WorkerView] = ()) -> None:
        self._views: list[WorkerView] = []
        self._places: dict[WorkerKey, int] = {}
        for view in views:
            self.put(view)

    def put(self, view: WorkerView) -> None:
        """New, or in place of what was known of the same worker."""
        place = self._places.get(view.key)
        if place is None:
            self._places[view.key] = len(self._views)
            self._views.append(view)
        else:
            self._views[place] = view

    def drop(self, key: WorkerKey) -> None:
        place = self._places.pop(key, None)
        if place is None:
            return
        last = self._views.pop()
        if last.key != key:
            self._views[place] = last
            self._places[last.key] = place

    def find(self, key: WorkerKey) -> WorkerView | None:
        place = self._places.get(key)
        return None if place is None else self._views[place]

    @overload
    def __getitem__(self, index: int) -> WorkerView: ...

    @overload
    def __getitem__(self, index: slice) -> list[WorkerView]: ...

    def __getitem__(self, index: Any) -> Any:
        return self._views[index]

    def __len__(self) -> int:
        return len(self._views)

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self._views)


@dataclass(slots=True)
class PoolsView:
    """`broken_paths`: (source, reader) between which KV does not move at present."""

    decode: Pool
    prefill: Pool
    broken_paths: Set[tuple[WorkerKey, WorkerKey]] = field(default_factory=frozenset)

    @classmethod
    def of(
        cls,
        decode: Iterable[WorkerView],
        prefill: Iterable[WorkerView],
        broken_paths: Set[tuple[WorkerKey, WorkerKey]] = frozenset(),
    ) -> PoolsView:
        return cls(Pool(decode), Pool(prefill), broken_paths)

    def find(self, key: WorkerKey) -> WorkerView | None:
        return self.decode.find(key) or self.prefill.find(key)

    def reaches(self, source: WorkerView, reader: WorkerView) -> bool:
        """Whether the reader can pull the source's KV."""
        return source.layout_fingerprint == reader.layout_fingerprint and (
            not self.broken_paths or (source.key, reader.key) not in self.broken_paths
        )
