"""What a decision sees: one view of all workers, kept up to date event by event, never built anew for a request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

from router.placement.correction import UNCORRECTED, Corrected
from router.placement.newcomers import NOBODY, Newcomers

# Used until a worker has measured its own. Deliberately modest: they hold for the first requests only.
_PREFILL_TOKENS_PER_S = 1000.0
_PULL_BYTES_PER_S = 1e9
_LONGEST_DRAIN_MS = 1000.0  # a report older than that says nothing about now
_STANDS_S = 0.5  # so long, what newcomers are delayed is not worked out anew
_ANY_LENGTH = 1 << 40


def room_for(tokens: int, kept_tokens: int) -> int:
    """How long a sequence may be that has room for `tokens`, of which it keeps `kept_tokens` at most (0: all)."""
    return _ANY_LENGTH if 0 < kept_tokens <= tokens else tokens


class WorkerKey(NamedTuple):
    """One incarnation of a worker. A tuple, because a decision looks up dozens of keys: it is hashed without Python."""

    worker_id: str
    epoch: int


@dataclass(slots=True)
class WorkerView:
    """One worker: its last report, what this router has promised since, and what its estimates were worth lately.

    Never changed once made (not `frozen`, which would double what making one costs; clusters make thousands a second).
    """

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
    newcomers: Newcomers = NOBODY  # what was sent here lately
    fixed_bytes: int = 0  # of a handoff, whatever the prompt's length
    kept_tokens: int = 0  # of a sequence, the most that blocks are held for; 0: all
    pairing: str = ""  # where schemes of weights mix: equal ones may hand over; empty: as their layouts

    # What many decisions ask of it, worked out once.
    pairs_as: str = field(init=False, repr=False, compare=False)  # equal: KV may be handed over
    pull_rate: float = field(init=False, repr=False, compare=False)
    total_tokens: int = field(init=False, repr=False, compare=False)  # of the longest sequence that it could ever hold
    free_tokens: int = field(init=False, repr=False, compare=False)  # that it could hold now
    raw_itl_ms: float = field(init=False, repr=False, compare=False)  # step time of its decodes with a sequence more
    itl_ms: float = field(init=False, repr=False, compare=False)  # the same, corrected
    chunk_ms: float = field(init=False, repr=False, compare=False)  # of a whole chunk beside decodes; 0: none, no limit
    delays: float = field(init=False, repr=False, compare=False)  # prompts a ms, by each ms of work, as of then
    delays_until: float = field(init=False, repr=False, compare=False)
    _reported_ms: float = field(init=False, repr=False, compare=False)
    _promised_ms: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.pairs_as = self.pairing or self.layout_fingerprint
        rate = self.prefill_tokens_per_s or _PREFILL_TOKENS_PER_S
        self.pull_rate = self.pull_bytes_per_s or _PULL_BYTES_PER_S
        self.total_tokens = self.total_blocks * self.block_tokens
        self.free_tokens = self.free_blocks * self.block_tokens
        if self.kept_tokens:
            self.total_tokens = room_for(self.total_tokens, self.kept_tokens)
            self.free_tokens = room_for(self.free_tokens, self.kept_tokens)
        self._reported_ms = self.backlog_tokens / rate * 1e3
        self._promised_ms = self.promised_tokens / rate * 1e3
        # Half of a step is taken to be shared by all (weights), the other half to grow with the sequences.
        running = self.running_sequences
        reported = running - self.arriving_sequences
        if reported < 1:
            reported = 1
        more = running + 1 if running >= reported else reported
        raw = self.raw_itl_ms = (self.decode_step_ms or self.step_ms) * (0.5 + 0.5 * more / reported)
        self.itl_ms = self.step(raw) if raw else 0.0
        self.chunk_ms = self.prefill_ms(self.chunk_tokens) if running and self.chunk_tokens else 0.0
        self.delays = self.newcomers.delayed(self.newcomers.at)
        self.delays_until = self.newcomers.at + _STANDS_S if self.delays else math.inf

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

    def beside_decodes_ms(self, tokens: float) -> float:
        """The same with the decodes that share its steps."""
        own = self.prefill_ms(tokens)
        if self.chunk_ms and self.itl_ms and own:
            own *= 1.0 + self.itl_ms / min(own, self.chunk_ms)
        return own

    def wait_ms(self, now: float) -> float:
        """Until a prompt that comes now has its turn: what was reported, less what was computed since, and promises."""
        waiting = self._reported_ms
        if waiting and self.reported_at is not None:
            since_ms = (now - self.reported_at) * 1e3
            if since_ms > 0.0:
                waiting -= since_ms if since_ms < _LONGEST_DRAIN_MS else _LONGEST_DRAIN_MS
                if waiting < 0.0:
                    waiting = 0.0
        return waiting + self._promised_ms


class Pool(Sequence[WorkerView]):
    """The ready workers of one role, in no order. `changes` counts who came and left."""

    __slots__ = ("_places", "_views", "changes")

    def __init__(self, views: Iterable[WorkerView] = ()) -> None:
        self.changes = 0
        self._views: list[WorkerView] = []
        self._places: dict[WorkerKey, int] = {}
        for view in views:
            self.put(view)

    def put(self, view: WorkerView) -> None:
        """New, or in place of what was known of the same worker."""
        place = self._places.get(view.key)
        if place is None:
            self.changes += 1
            self._places[view.key] = len(self._views)
            self._views.append(view)
        else:
            self._views[place] = view

    def drop(self, key: WorkerKey) -> None:
        place = self._places.pop(key, None)
        if place is None:
            return
        self.changes += 1
        last = self._views.pop()
        if last.key != key:
            self._views[place] = last
            self._places[last.key] = place

    def find(self, key: WorkerKey) -> WorkerView | None:
        place = self._places.get(key)
        return None if place is None else self._views[place]

    def at(self, places: Iterable[int]) -> list[WorkerView]:
        views = self._views
        return [views[place] for place in places]

    def place(self, key: WorkerKey) -> int | None:
        return self._places.get(key)

    def places(self, keys: Iterable[WorkerKey]) -> list[int]:
        """Indices of those that are here, in the order of `keys`."""
        places = self._places
        return [places[key] for key in keys if key in places]

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
    """`broken_paths`: (source, reader) between which KV does not move at present. Nothing is placed on `standby`; it
    lends prefixes.
    """

    decode: Pool
    prefill: Pool
    broken_paths: Set[tuple[WorkerKey, WorkerKey]] = field(default_factory=frozenset)
    standby: Pool = field(default_factory=Pool)

    @classmethod
    def of(
        cls,
        decode: Iterable[WorkerView],
        prefill: Iterable[WorkerView],
        broken_paths: Set[tuple[WorkerKey, WorkerKey]] = frozenset(),
    ) -> PoolsView:
        return cls(Pool(decode), Pool(prefill), broken_paths)

    def find(self, key: WorkerKey) -> WorkerView | None:
        found = self.decode.find(key)
        if found is None:
            found = self.prefill.find(key)
        return self.standby.find(key) if found is None else found

    def reaches(self, source: WorkerView, reader: WorkerView) -> bool:
        """Whether the reader can pull the source's KV."""
        return source.pairs_as == reader.pairs_as and (
            not self.broken_paths or (source.key, reader.key) not in self.broken_paths
        )
