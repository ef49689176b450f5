"""One sequence being computed: its tokens, and how far its KV stands."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from engine.adapters.slots import InSlot
from engine.beams import BeamAnswer
from engine.drafting import Drafting
from engine.types import FinishReason, SequenceSpec
from kv_transfer.block_hash import chain_hashes
from kv_transfer.handoff import TokenLogprobs
from kv_transfer.prefix_hint import HintChain


class Status(enum.Enum):
    HELD = enum.auto()  # waits for KV from elsewhere; may have a reservation
    WAITING = enum.auto()  # runnable, holds no blocks
    RUNNING = enum.auto()  # holds blocks for all its known tokens
    FINISHED = enum.auto()  # retained: holds blocks until drop()


class Searching(Protocol):
    """A beam search, as its sequences know it (engine/beam_search.py)."""

    beams: list[Sequence]

    @property
    def blocks(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def leader(self) -> int: ...

    def held(self) -> Iterable[int]: ...

    def reserve(self) -> bool: ...

    def release(self) -> None: ...

    def take(self, sequence: Sequence, logprobs: TokenLogprobs) -> list[Sequence] | None: ...

    def answers(self) -> tuple[BeamAnswer, ...]: ...


@dataclass(slots=True, eq=False)
class Sequence:
    """Token ranges::

    tokens        |<------------- prompt ------------->|<---- emitted ---->|<- coming ->|
    KV            |<- num_computed ->|<- in_flight ->|<------- remaining -------------->|

    Steps that were planned and not committed yet compute `in_flight` tokens and sample `coming` ones. Drafts count as
    in flight only: of those that are accepted the commit makes tokens, and the others were never there.
    """

    spec: SequenceSpec
    arrival: int
    parent: bytes  # root of the block names
    status: Status
    tokens: list[int] = field(default_factory=list)
    num_prompt: int = 0
    hand_over: bool = False  # ends with the next token that is sampled, for another worker to go on
    retain: bool = False  # its end leaves the blocks, until drop()
    due_at: float = 0.0  # when its first token should be there; without a due date, when it came
    put_back: bool = False  # it cannot be in time, or others could not be because of it (engine/overload.py)
    found_tokens: int = 0  # in the prefix cache when it was queued
    num_computed: int = 0
    computed_from: int = 0  # what was here before its own steps: cached, or received
    tables: list[list[int]] = field(default_factory=lambda: [[]])  # by group (engine/kv_groups.py)
    snapshot: int = -1  # of a state: the cached slot that it begins with
    has_state: bool = False  # its own slot holds one
    outgrows_at: int = sys.maxsize  # with so many tokens it is computed again, by the long table (engine/longrope.py)
    long: bool = False  # by that table
    table_known: bool = True  # by which one received KV was made
    names: list[bytes] = field(default_factory=list)
    hints: list[int] = field(default_factory=list)
    hint_chain: HintChain | None = None
    num_published: int = 0
    cached_tokens: int = 0
    sampled_here: int = 0
    in_flight: int = 0
    coming: int = 0
    ending: bool = False  # the token that is coming ends it, or its life, whatever it is
    place: int = 0  # in the last plan that has it
    lives: int = 0  # how often it has lost its blocks: steps planned before do not count any more
    drafting: Drafting | None = None
    adapter: InSlot | None = None  # while it has blocks to compute in
    search: Searching | None = None  # that it leads, or is a beam of
    copies: tuple[tuple[int, int], ...] = ()  # of blocks, with its next step

    @property
    def block_ids(self) -> list[int]:
        """In the first group."""
        return self.tables[0]

    @property
    def sequence_id(self) -> int:
        return self.spec.sequence_id

    @property
    def remaining(self) -> int:
        """Tokens to plan."""
        return 0 if self.ending else self.num_foreseen - self.num_computed - self.in_flight

    @property
    def uncomputed(self) -> int:
        """Known tokens whose KV does not stand yet."""
        return len(self.tokens) - self.num_computed

    @property
    def num_foreseen(self) -> int:
        return len(self.tokens) + self.coming

    @property
    def num_emitted(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def leads(self) -> bool:
        """A beam search; else it may be a beam."""
        return self.spec.beams is not None

    @property
    def is_beam(self) -> bool:
        return self.search is not None and self.spec.beams is None

    @property
    def places(self) -> int:
        """Of running sequences, that it takes. A leader takes those of its beams: only its prompt is computed in it."""
        if self.search is None:
            return 1
        return self.search.width if self.leads else 0

    @property
    def order(self) -> tuple[bool, int, float, int]:
        """Who goes first: who is not put back, then higher priority, earlier due date, earlier arrival."""
        return (self.put_back, *self.turn)

    @property
    def turn(self) -> tuple[int, float, int]:
        """The same, before anybody is put back."""
        return (-self.spec.priority, self.due_at, self.arrival)

    @property
    def wants_prompt(self) -> bool:
        """Its prompt's log-probabilities, which have not left yet: every token of it is computed."""
        return self.spec.sampling.prompt_logprobs is not None and self.num_emitted == 0

    @property
    def may_be_put_back(self) -> bool:
        """An answer that has begun goes on, here or after a recovery; without a due date nobody can tell."""
        return self.spec.due_s is not None and self.sampled_here == 0 and not self.spec.emitted

    def name_blocks(self, num_tokens: int, block_tokens: int) -> list[bytes]:
        """Names of the full blocks in the first `num_tokens` tokens; computed once."""
        wanted = num_tokens // block_tokens
        have = len(self.names)
        if wanted > have:
            parent = self.names[-1] if self.names else self.parent
            self.names += chain_hashes(self.tokens[have * block_tokens : wanted * block_tokens], block_tokens, parent)
        return self.names[:wanted]

    def hint_blocks(self, num_tokens: int, block_tokens: int) -> list[int]:
        """Likewise, their hints: what routers know them by."""
        chain = self.hint_chain
        if chain is None:
            chain = self.hint_chain = HintChain(block_tokens, int.from_bytes(self.parent[:8], "little"))
        if num_tokens // block_tokens > chain.blocks:
            self.hints += chain.extend(self.tokens[chain.blocks * block_tokens : num_tokens]).tolist()
        return self.hints[: num_tokens // block_tokens]

    @property
    def needs_its_token(self) -> bool:
        """Its next step cannot be planned before the token that is coming is known: the host prepares its sampling."""
        goes_on = self.coming > 0 and not self.ending
        one_by_one = self.spec.matcher is not None or self.search is not None
        return goes_on and (one_by_one or self.spec.sampling.looks_back)

    def plan(self, count: int, place: int, context_limit_tokens: int) -> None:
        """The next step computes `count` tokens of it, as its item number `place`."""
        self.in_flight += count
        self.place = place
        if self.num_computed + self.in_flight < self.num_foreseen:
            return
        self.coming += 1
        self.look_ahead(context_limit_tokens)

    def look_ahead(self, context_limit_tokens: int) -> None:
        """Whether the token that is coming ends it, or its life, as things stand."""
        foreseen = self.num_foreseen
        self.ending = self.coming > 0 and (
            self.hand_over
            or foreseen - self.num_prompt >= self.spec.sampling.max_tokens
            or foreseen >= context_limit_tokens
            or foreseen >= self.outgrows_at
        )

    def landed(self, end: int, count: int, *, sampled: bool) -> None:
        """A step is done: the KV of the first `end` tokens stands, the last `count` of them since now."""
        self.num_computed = end
        self.in_flight -= count
        self.coming -= sampled

    def lose_blocks(self) -> None:
        """What is in flight for it counts no more. Its blocks have been released."""
        self.num_computed = self.num_published = self.in_flight = self.coming = 0
        self.ending = False
        self.lives += 1
        if self.drafting is not None:
            self.drafting.lost_blocks()

    @property
    def outgrown(self) -> bool:
        """What stands of its KV is of no use for its next token."""
        return len(self.tokens) >= self.outgrows_at

    def turn_long(self, parent: bytes) -> None:
        """From now on its KV is made by the long table, and its blocks have other names."""
        self.long, self.outgrows_at = True, sys.maxsize
        self.parent = parent
        self.names, self.hints, self.hint_chain = [], [], None

    def finish_reason(self, context_limit_tokens: int) -> FinishReason | None:
        """Whether the last emitted token ends the answer; of one without any, whether none is wanted."""
        sampling = self.spec.sampling
        position = self.num_emitted - 1
        if position < 0:
            return FinishReason.LENGTH if sampling.max_tokens == 0 else None
        if self.spec.matcher is not None and self.spec.matcher.complete:
            return FinishReason.STOP
        if position >= sampling.min_tokens and self.tokens[-1] in sampling.stop_token_ids:
            return FinishReason.STOP
        if position + 1 >= sampling.max_tokens or len(self.tokens) >= context_limit_tokens:
            return FinishReason.LENGTH
        return None
