"""Values that cross the engine's edge."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.adapters.slots import InSlot
from engine.beams import BeamAnswer, BeamParams
from engine.grammar import Matcher
from engine.prompt_logprobs import PromptLogprobs
from kv_transfer.handoff import Room, TokenLogprobs
from kv_transfer.layout import StateUse
from settings.sampling import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_TOKENS,
    MAX_BANNED,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    RANGES,
)


class FinishReason(enum.StrEnum):
    STOP = "stop"  # an end-of-sequence or stop token (stop strings are the router's business)
    LENGTH = "length"  # max_tokens, or the context limit


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Every default resolved. Sampling is keyed by (seed, position), so that any worker continues alike.

    `max_tokens` counts from position 0 over all attempts; 0: the prompt is computed, and no more. `logprobs` is None or
    how many alternatives are wanted.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # likewise, of the prompt's own tokens
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit), each token once
    allowed_token_ids: tuple[int, ...] = ()  # no other token is sampled; empty: any
    bad_words: tuple[tuple[int, ...], ...] = ()  # the last token of each does not follow the others in the answer

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def looks_back(self) -> bool:
        """What it samples depends on the tokens before."""
        return self.penalised or bool(self.bad_words)

    @property
    def searchable(self) -> bool:
        """A beam search goes by the model's own distribution."""
        shaped = self.penalised or self.logit_bias or self.allowed_token_ids or self.bad_words
        return not shaped and self.logprobs is None and self.prompt_logprobs is None

    def problem(self, vocab_size: int) -> str:
        """What of it cannot be computed with, whoever let it pass; empty: nothing."""
        for name, allowed in RANGES.items():
            if getattr(self, name) not in allowed:
                return f"{name} is {getattr(self, name)}; use {allowed}"
        if self.min_tokens < 0:
            return f"min_tokens is {self.min_tokens}; use a number >= 0"
        for name in ("logprobs", "prompt_logprobs"):
            if (asked := getattr(self, name)) is not None and not 0 <= asked <= MAX_LOGPROBS:
                return f"{name} is {asked}; use at most {MAX_LOGPROBS}"
        for token, bias in self.logit_bias:
            if not 0 <= token < vocab_size:
                return f"logit_bias names token {token}, which is not in the vocabulary of {vocab_size}; leave it out"
            if not abs(bias) <= MAX_LOGIT_BIAS:  # also what is not a number
                return f"logit_bias of token {token} is {bias}; use [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]"
        if len(self.allowed_token_ids) > MAX_ALLOWED_TOKEN_IDS:
            return f"{len(self.allowed_token_ids)} allowed tokens, the limit is {MAX_ALLOWED_TOKEN_IDS}; send fewer"
        if len(self.bad_words) > MAX_BANNED:
            return f"{len(self.bad_words)} sequences for bad words, the limit is {MAX_BANNED}; send fewer"
        if any(not 1 <= len(word) <= MAX_BAD_WORD_TOKENS for word in self.bad_words):
            return f"a bad word does not have 1 to {MAX_BAD_WORD_TOKENS} tokens; send another"
        named = itertools.chain(self.allowed_token_ids, *self.bad_words)
        if (unknown := next((t for t in named if not 0 <= t < vocab_size), None)) is not None:
            return (
                f"token {unknown} is allowed or in a bad word, and not in the vocabulary of {vocab_size}; leave it out"
            )
        return ""


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """What a worker is asked to compute. `emitted` tokens are law: they are computed over, never sampled again."""

    sequence_id: int
    prompt: Sequence[int]
    sampling: SamplingParams
    emitted: Sequence[int] = ()
    priority: int = 0  # higher first
    due_s: float | None = None  # until its first token is late; None: no matter, first come
    put_back_weight: float = 1.0  # what its work counts for when somebody is put back (engine/overload.py)
    cache_salt: str = ""
    adapter: str = ""  # its digest; empty: the model alone
    mixed_kv: bool = False  # some of its KV was computed with weights of another scheme: its blocks have other names
    hold: bool = False  # do not schedule: its KV will be received (reserve, then adopt or continue_locally)
    hand_over: bool = False  # sample one token, then end as handed over (unless that token ends the answer)
    matcher: Matcher | None = None  # at the beginning of the answer; the engine takes it on from there
    retain: bool = False  # keep the blocks at the end until drop(): somebody else still needs them
    beams: BeamParams | None = None  # its answers are searched for, and come whole (engine/beam_search.py)


class RefusalCode(enum.StrEnum):
    INVALID = "invalid"  # can never run, here or elsewhere
    LACKING = "lacking"  # can never run here: what it needs others may have
    BUSY = "busy"  # the waiting queue is full


@dataclass(frozen=True, slots=True)
class Refusal:
    code: RefusalCode
    reason: str  # the cause and the fix


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room for a sequence that will be received: in every group, in the layout's order."""

    rooms: tuple[Room, ...]

    @property
    def block_ids(self) -> tuple[int, ...]:
        return self.rooms[0].table

    @property
    def cached_blocks(self) -> int:
        """Leading ones that need not be received."""
        return self.rooms[0].skip


TO_COME = -1  # stands for a token that the step before samples, or a draft model says


@dataclass(frozen=True, slots=True)
class DraftWork:
    """The draft model's KV of `history` stands up to `start` and shall stand up to `end`; from the last token on it
    drafts. `table`: the group whose blocks it has. `base`: of a prediction head, whose sequence begins there
    (engine/prediction_head.py).
    """

    start: int
    end: int
    table: int
    base: int = 0


@dataclass(frozen=True, slots=True)
class DraftPass:
    """One forward pass of the draft model, in the terms of engine/step_cost.py."""

    sequences: int
    tokens: int
    context_tokens: int
    attention_pairs: float
    prompt_tokens: int
    ms: float


@dataclass(frozen=True, slots=True)
class PlanItem:
    """One sequence's part of a step: compute tokens [start, start + len(token_ids)) of the sequence.

    `sample` is true when the last of them is the sequence's last token. `position` is the answer position of
    the token to be sampled (0 is the first). `prompt_len` and `history` (prompt + emitted) serve penalties only.

    `follows`: the step was planned while the one before it was computing, and this item's only token, TO_COME, is what
    item number `follows` of that step samples. `history` has it from that step's commit on.

    `drafts`: the last of `token_ids`, which nobody has sampled: they are computed to be verified. Each position after
    the last known token is sampled, up to the first whose draft is not what was sampled.

    `draft`: what a draft model does before the step. It fills in `drafts`, which the plan has places for (TO_COME).

    `prompt_logprobs`: of the prompt tokens behind each of these, if set, with so many alternatives.

    `copies`: (from, to) of blocks, before anything is computed.
    """

    sequence_id: int
    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]  # the block table, enough for start + len(token_ids) tokens
    sample: bool
    position: int
    sampling: SamplingParams
    prompt_len: int
    history: Sequence[int]
    matcher: Matcher | None = None  # at `position`
    follows: int | None = None
    others: Sequence[Sequence[int]] = ()  # tables in the groups after the first; -1: a block that is left behind
    state: StateUse | None = None
    long: bool = False  # by the long rotary table (engine/longrope.py)
    drafts: Sequence[int] = ()
    draft: DraftWork | None = None
    adapter: InSlot | None = None
    prompt_logprobs: int | None = None
    copies: Sequence[tuple[int, int]] = ()

    @property
    def decodes(self) -> bool:
        """It goes on with an answer, or computes the one token that a prompt lacks."""
        return self.start > 0 and len(self.token_ids) - len(self.drafts) == 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    step: int
    items: tuple[PlanItem, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(item.token_ids) for item in self.items)


Sampled = tuple[int, TokenLogprobs | None]


class Failed(NamedTuple):
    cause: str
    ours: bool = True  # else what the request asked for leaves no token
    adapter_lost: bool = False  # its adapter cannot be loaded any more; `cause` says why and what to do


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sampled token per item, aligned with plan.items (None where `sample` was false), and log-probabilities.

    `failures`: by place in the plan, the items that could not be computed; they have no token.

    `further`: by place, what an item with drafts has sampled after that token, one for each draft that was accepted.

    `passes`: of the draft model, before the step itself. Without any, nobody can tell that what was asked was done.

    `prompt_logprobs`: by place, of the items that asked for them.

    `drafts_over`: the draft model has failed too often, and drafts no more.
    """

    token_ids: tuple[int | None, ...]
    logprobs: tuple[TokenLogprobs | None, ...]
    failures: Mapping[int, Failed] = field(default_factory=dict)
    further: Mapping[int, Sequence[Sampled]] = field(default_factory=dict)
    passes: Sequence[DraftPass] = ()
    prompt_logprobs: Mapping[int, PromptLogprobs] = field(default_factory=dict)
    drafts_over: bool = False


@dataclass(frozen=True, slots=True)
class SampledToken:
    sequence_id: int
    position: int
    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class SequenceEnded:
    """`reason` None: handed over, or, with `error`, failed. Without `retain` the blocks are free already."""

    sequence_id: int
    reason: FinishReason | None
    cached_tokens: int
    error: str = ""  # the cause
    ours: bool = False  # with `error`: not the request's fault, as far as can be told


@dataclass(frozen=True, slots=True)
class Progress:
    """A sequence's KV stands for its first `num_computed_tokens` tokens. `tables`: by group; of a state its slot."""

    sequence_id: int
    num_computed_tokens: int
    tables: tuple[tuple[int, ...], ...]
    cached_tokens: int


@dataclass(slots=True)
class StepEvents:
    """All that a step changed, in order. `progress` has only sequences with `retain` (sources announce from it)."""

    tokens: list[SampledToken] = field(default_factory=list)
    ends: list[SequenceEnded] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, PromptLogprobs]] = field(default_factory=list)  # by sequence; before its tokens
    beams: list[tuple[int, tuple[BeamAnswer, ...]]] = field(default_factory=list)  # by sequence; before its end


@dataclass(frozen=True, slots=True)
class BlockEvents:
    """Changes of the prefix cache since last asked, by hint (kv_transfer/prefix_hint.py).

    `stored` has for each block its hint and that of the block before it (0: none).
    """

    stored: tuple[tuple[int, int], ...] = ()
    removed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineLoad:
    running_sequences: int
    waiting_sequences: int
    held_sequences: int
    prefill_backlog_tokens: int
    context_tokens: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    preemptions_total: int
    tokens_total: int
    chunk_tokens: int  # of prompts in the next step beside the decodes that run, at most
    waiting_blocks: int  # that sequences without blocks will take for the tokens known of them
    decode_ms: float  # a step of the decodes that run now, by the learned costs; 0: those are not worth much yet
    put_back_sequences: int  # prompts that cannot be in time and let others go first (engine/overload.py)
    put_back_tokens: int  # of `prefill_backlog_tokens`, theirs
    blocks_in_use: int  # in all groups
