"""Values between a worker's core and its edges. The wire forms are in `worker/wire.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.beams import BeamAnswer, BeamParams
from engine.drafting import Drafted
from engine.grammar import Grammar
from engine.prompt_logprobs import PromptLogprobs
from engine.types import FinishReason, SamplingParams
from grammar.structured import Structured
from kv_transfer.handoff import (
    Acceptance,
    PeerId,
    ReaderMessage,
    SourceMessage,
    TokenLogprobs,
)
from kv_transfer.paths import PathStatus
from kv_transfer.transport import TransportEvent
from worker.timeline import FirstStep, SequenceTrace

Link = int  # one router's stream; numbers are not reused within a process


@dataclass(frozen=True, slots=True)
class HandoffRef:
    """`most_tokens` > 0: the sequence runs at its source, and comes with so many tokens at most."""

    handoff_id: str
    source: PeerId
    source_address: str
    most_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PrefixPull:
    """The KV of the prompt's first `num_tokens` tokens is to be had there; after `wait_s` it is better computed."""

    ref: HandoffRef
    num_tokens: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class StartSequence:
    """`sequence_id` is the router's, unique on its link. `deadline_s` is relative to arrival; None = unbounded.

    `due_s`: until its first token is late; None: no matter, first come. `put_back_weight`, above 0 to 1: what its work
    counts for when not all can be in time.
    """

    sequence_id: int
    request_id: str
    prompt: Sequence[int]
    emitted: Sequence[int]
    sampling: SamplingParams
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""
    adapter: str = ""  # digest; empty: the model alone
    mixed_kv: bool = False
    acceptance: Acceptance | None = None  # of its drafts, where it was before
    serve_handoff_id: str = ""
    pull: HandoffRef | None = None
    prefix_pull: PrefixPull | None = None
    due_s: float | None = None
    put_back_weight: float = 1.0
    traceparent: str = ""
    structured: Structured | None = None
    beams: BeamParams | None = None


@dataclass(frozen=True, slots=True)
class CancelSequence:
    sequence_id: int
    reason: str = ""
    keep_lease: bool = False


@dataclass(frozen=True, slots=True)
class ContinueLocally:
    sequence_id: int
    emitted: Sequence[int]


@dataclass(frozen=True, slots=True)
class FollowAnother:
    sequence_id: int
    emitted: Sequence[int]
    pull: HandoffRef


@dataclass(frozen=True, slots=True)
class ServeRunning:
    """A sequence that runs here will go on elsewhere: announce its blocks under this handoff while it goes on. It is
    handed over when told to (Freeze), and at `most_tokens` known tokens at the latest.
    """

    sequence_id: int
    handoff_id: str
    most_tokens: int


@dataclass(frozen=True, slots=True)
class Freeze:
    """Hand a served sequence over at its next token."""

    sequence_id: int
    handoff_id: str


@dataclass(frozen=True, slots=True)
class KeepRunning:
    """Nobody takes a served sequence over: it goes on here."""

    sequence_id: int
    handoff_id: str


class RoleSaid(NamedTuple):
    """What a worker is sent: "prefill", "decode" or "standby". Of two, the one with more `changes` is the later."""

    role: str
    changes: int = 0


@dataclass(frozen=True, slots=True)
class SetRole:
    """From now on. What is here stays."""

    role: str


@dataclass(frozen=True, slots=True)
class ResyncBlocks:
    """The router has lost count of the prefix cache's events."""


Command = (
    StartSequence
    | CancelSequence
    | ContinueLocally
    | FollowAnother
    | ServeRunning
    | Freeze
    | KeepRunning
    | SetRole
    | ResyncBlocks
)

# What reaches the core.


@dataclass(frozen=True, slots=True)
class RouterCommands:
    """`received`: when they came, on the clock of `now`; None: when they are handled."""

    link: Link
    commands: tuple[Command, ...]
    received: float | None = None


@dataclass(frozen=True, slots=True)
class RouterConnected:
    """A new link: it is owed the load and a snapshot of the prefix cache."""

    link: Link


@dataclass(frozen=True, slots=True)
class RouterLost:
    link: Link


@dataclass(frozen=True, slots=True)
class ReaderMessages:
    peer: PeerId
    messages: tuple[ReaderMessage, ...]


@dataclass(frozen=True, slots=True)
class ReaderLost:
    peer: PeerId


@dataclass(frozen=True, slots=True)
class SourceMessages:
    peer: PeerId
    messages: tuple[SourceMessage, ...]


@dataclass(frozen=True, slots=True)
class SourceAttached:
    """`other_scheme`: its weights are quantized otherwise than ours."""

    peer: PeerId
    other_scheme: bool = False


@dataclass(frozen=True, slots=True)
class SourceGone:
    """Not a peer any more."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class SourceLost:
    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Transported:
    event: TransportEvent


@dataclass(frozen=True, slots=True)
class GrammarCompiled:
    """`grammar` None: it cannot be compiled, and `error` says why."""

    structured: Structured
    grammar: Grammar | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new work. What is here goes on."""


Inbound = (
    RouterCommands
    | RouterConnected
    | RouterLost
    | ReaderMessages
    | ReaderLost
    | SourceMessages
    | SourceAttached
    | SourceGone
    | SourceLost
    | Transported
    | GrammarCompiled
    | Drain
)

# What leaves the core.


class Code:
    """The google.rpc.Code numbers that a worker uses."""

    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    INTERNAL = 13
    UNAVAILABLE = 14


@dataclass(frozen=True, slots=True)
class Ended:
    """`reason` None without error: handed over."""

    sequence_id: int
    reason: FinishReason | None
    cached_tokens: int = 0
    code: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class HandoffFailed:
    sequence_id: int
    reason: str
    detail: str
    kept_tokens: int
    handoff_id: str


@dataclass(frozen=True, slots=True)
class HandoffAdopted:
    sequence_id: int
    pulled_bytes: int
    cached_tokens: int
    kv_early_share: float
    adopt_ms: float
    handoff_id: str
    transfer_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """All that stands of a sequence that still runs at its source has arrived here: it may be frozen now."""

    sequence_id: int
    handoff_id: str


@dataclass(frozen=True, slots=True)
class BlockChanges:
    """Up to three prefix cache events, in this order, numbered from `first_sequence_number`; blocks as in BlockEvents.

    A snapshot has `cleared`: what was said before it is of no use to its reader.
    """

    first_sequence_number: int
    cleared: bool = False
    removed: tuple[int, ...] = ()
    stored: tuple[tuple[int, int], ...] = ()

    @property
    def num_events(self) -> int:
        return self.cleared + bool(self.removed) + bool(self.stored)


@dataclass(frozen=True, slots=True)
class Load:
    """Fields and units as WorkerLoad in cluster.proto."""

    running_sequences: int = 0
    waiting_sequences: int = 0
    prefill_backlog_tokens: int = 0
    context_tokens: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    leased_blocks: int = 0
    quarantined_blocks: int = 0
    step_ms: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    pull_bytes_per_s: float = 0.0
    tokens_total: int = 0
    preemptions_total: int = 0
    waiting_blocks: int = 0
    put_back_sequences: int = 0
    put_back_tokens: int = 0
    blocks_in_use: int = 0
    last_sequence_id: int = 0
    chunk_tokens: int = 0
    decode_step_ms: float = 0.0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    prefix_pulls_total: int = 0
    prefix_pull_failures_total: int = 0
    handoffs_total: int = 0
    handoff_failures_total: int = 0
    active_leases: int = 0
    input_busy_s: float = 0.0
    output_busy_s: float = 0.0
    step_constant_ms: float = 0.0
    step_per_sequence_ms: float = 0.0
    step_per_token_ms: float = 0.0
    step_per_context_token_ms: float = 0.0
    step_per_attention_pair_ms: float = 0.0
    step_cost_error: float = 0.0
    verifications_total: int = 0
    drafts_total: int = 0
    drafts_accepted_total: int = 0
    loaded_adapters: tuple[str, ...] = ()
    adapter_load_ms: float = 0.0
    paths: tuple[PathStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterWord:
    """What a name stands for; without a digest: for nothing any more."""

    name: str
    digest: str
    directory: str
    stamp: int = 0
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdaptersSaid:
    """As routers hear it."""

    adapters: tuple[AdapterWord, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()  # names and digests
    gone: tuple[tuple[str, int], ...] = ()  # names and stamps
    changes: int = 0
    takes_more: bool = False


@dataclass(slots=True)
class LinkOutput:
    """One step of one link. Columns: sequence_ids, positions and token_ids have equal length."""

    sequence_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, int, TokenLogprobs]] = field(default_factory=list)  # sequence, position, value
    prompt_logprobs: list[tuple[int, PromptLogprobs]] = field(default_factory=list)  # by sequence, in order
    beams: list[tuple[int, tuple[BeamAnswer, ...]]] = field(default_factory=list)  # by sequence; before its end
    ends: list[Ended] = field(default_factory=list)
    handoff_failures: list[HandoffFailed] = field(default_factory=list)
    adoptions: list[HandoffAdopted] = field(default_factory=list)
    caught_up: list[CaughtUp] = field(default_factory=list)
    first_steps: list[FirstStep] = field(default_factory=list)
    drafted: dict[int, Drafted] = field(default_factory=dict)  # by sequence
    blocks: list[BlockChanges] = field(default_factory=list)
    load: Load | None = None
    role: RoleSaid | None = None
    draining: bool = False

    def add_blocks(self, changes: list[BlockChanges]) -> None:
        """A snapshot takes the place of all that waits before it: numbers stay contiguous within one message."""
        if any(change.cleared for change in changes):
            self.blocks.clear()
        self.blocks += changes

    def merge(self, later: LinkOutput) -> None:
        self.sequence_ids += later.sequence_ids
        self.positions += later.positions
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.beams += later.beams
        self.ends += later.ends
        self.handoff_failures += later.handoff_failures
        self.adoptions += later.adoptions
        self.caught_up += later.caught_up
        self.first_steps += later.first_steps
        self.drafted |= later.drafted
        self.add_blocks(later.blocks)
        self.load = later.load or self.load
        self.role = later.role or self.role
        self.draining = self.draining or later.draining


@dataclass(slots=True)
class Outbox:
    links: dict[Link, LinkOutput] = field(default_factory=dict)
    to_readers: list[tuple[PeerId, SourceMessage]] = field(default_factory=list)
    to_sources: list[tuple[PeerId, ReaderMessage]] = field(default_factory=list)
    traces: list[SequenceTrace] = field(default_factory=list)
    # histogram of the catalog, value, labels; alone they are no reason to send an outbox
    observations: list[tuple[str, float, dict[str, str] | None]] = field(default_factory=list)
