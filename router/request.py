"""An admitted request, and what a worker is asked for it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from grammar.structured import Structured
from kv_transfer.handoff import Acceptance
from router.placement.policy import PrefixPull, WorkerKey


class Finish(enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Beams:
    """The answers are searched for (router/beam_life.py)."""

    width: int
    answers: int  # that are given, best first
    length_penalty: float = 1.0
    early_stopping: Literal["never"] | bool = False


@dataclass(frozen=True, slots=True)
class Sampling:
    """Every default resolved; fields as ResolvedSampling in worker.proto, and the stop strings that stay here."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # what ends the answer is part of its text
    skip_special: bool = True  # and special tokens are not
    goes_on: bool = False  # its text goes on with the prompt's last message
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    structured: Structured | None = None
    beams: Beams | None = None

    @property
    def of_text(self) -> tuple[bool, bool, bool]:
        """What a TextStream is told."""
        return self.include_stop, self.skip_special, self.goes_on

    @property
    def room_tokens(self) -> int:
        """That the answer may come to take beside its prompt, all beams together."""
        return self.max_tokens if self.beams is None else self.max_tokens * self.beams.width

    @property
    def searching(self) -> Sampling:
        """By the model's distribution alone, whatever its defaults are."""
        return replace(self, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)

    @property
    def prompt_only(self) -> Sampling:
        """For who computes the prompt of a search, and hands it over whatever the first token would be."""
        most = max(2, self.max_tokens)
        return replace(self.searching, max_tokens=most, min_tokens=0, stop_token_ids=(), beams=None)

    @property
    def masks_tokens(self) -> bool:
        """Not every worker knows how."""
        return bool(self.allowed_token_ids or self.bad_words)


@dataclass(frozen=True, slots=True)
class Request:
    """An admitted request. `deadline` is absolute, on the clock that `now` comes from."""

    request_id: str
    prompt: Sequence[int]
    sampling: Sampling
    arrived: float
    deadline: float
    priority: int = 0
    cache_salt: str = ""
    adapter: str = ""  # its digest (router/placement/adapters.py); empty: the model alone
    traceparent: str = ""
    operation: str = "text_completion"  # or "chat", as the GenAI conventions have it
    prompt_cache_key: str = ""
    emitted: tuple[int, ...] = ()  # the answer's first tokens, of a stream that broke: the answer goes on behind them
    revision: str = ""  # of the model (router/placement/revisions.py); empty: not placed yet
    tenant: str = ""
    again: bool = False  # a further answer to a request that is counted already, and its prompt with it
    beside: str = ""  # the key of that request: its answer computes the prompt for this one, too (router/forks.py)
    answer: int = 0  # which of several answers to one prompt it is
    tools: bool = False  # it offers tools: the answer may hold calls, and its text shows the markers around them

    @property
    def answered_by(self) -> str:
        """What the answer may go on with, elsewhere: its revision, and its adapter."""
        return f"{self.revision}#{self.adapter}" if self.adapter else self.revision

    @property
    def needs_whole_prompt(self) -> bool:
        """What is cached of it is of no use: its log-probabilities are wanted, and have not come."""
        return self.sampling.prompt_logprobs is not None and not self.emitted

    def counted(self, answered: int) -> int:
        """Tokens, for rate limits. Several answers to one prompt count it once, and all beams of their search, too."""
        if self.again:
            return answered
        beams = self.sampling.beams
        return len(self.prompt) + answered * (1 if beams is None else beams.width - beams.answers + 1)

    @property
    def key(self) -> str:
        """Its name in this router: tenants may use the same request ids. A tenant's name has no newline."""
        return f"{self.tenant}\n{self.request_id}" if self.tenant else self.request_id


@dataclass(frozen=True, slots=True)
class LegStart:
    """What a worker is asked. Exactly one of `serve_handoff_id` and `pull` is set in a split.

    `prefix`: handoff id and what is pulled from another worker's prefix cache, for the leg that computes the prompt.
    `due_ms`: until that worker's first token is late; None: no matter. `put_back_weight`: what its work counts for
    if not all can be in time.
    """

    leg: int
    request: Request
    emitted: tuple[int, ...]
    serve_handoff_id: str = ""
    pull: tuple[str, WorkerKey] | None = None  # handoff id, source
    prefix: tuple[str, PrefixPull] | None = None
    due_ms: float | None = None
    put_back_weight: float = 1.0
    incoming_bytes: int = 0  # of KV, that the leg's worker is expected to pull
    acceptance: Acceptance | None = None  # of its drafts, where it was before
    mixed_kv: bool = False  # of weights of other schemes than its worker's, some of it (router/placement/mixing.py)
    most_tokens: int = 0  # > 0: what is pulled still runs at its source, and comes with so many tokens at most

    @property
    def beam_tokens(self) -> int:
        """That a search takes room for, beside its prompt."""
        sampling = self.request.sampling
        return 0 if sampling.beams is None or self.serve_handoff_id else sampling.room_tokens
