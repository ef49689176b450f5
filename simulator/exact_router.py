"""The real dispatcher without text: tokens are numbers, and a client only keeps the times."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from checkpoint.generation import SamplingDefaults
from router.dispatcher import Dispatcher
from router.errors import Failure
from router.lifecycle import Life
from router.placement.policy import Rejection, RequestFacts, Route, WorkerKey
from router.request import Finish, Request
from simulator.exact_worker import VOCABULARY
from simulator.flights import MAX_TOKENS
from simulator.gaps import worst_ms
from simulator.loop import EventLoop
from simulator.outcome import Outcome
from simulator.policies import Policy


class _Text:
    """No text is made: tokens are numbers here."""

    stopped = False

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class NoTokenizer:
    name = "simulated"
    vocab_size = VOCABULARY
    context_limit_tokens = 1 << 20
    eos_token_ids: frozenset[int] = frozenset()
    longest_token_chars = 1
    sampling_defaults = SamplingDefaults()
    chat_template_text = ""

    def special_ids(self, markers: Sequence[str]) -> dict[str, int]:
        return {}

    def build_llguidance(self) -> Any:
        raise AssertionError("no request has a format")


class SimulatedDispatcher(Dispatcher):
    policy: Policy
    policy_rng: random.Random

    def _new_text(self, request: Request) -> Any:
        return _Text()

    def decide(self, facts: RequestFacts) -> Route | Rejection:
        # How long the answer will be is in the trace, and nobody's to know.
        expected = self.answer_tokens.expected(MAX_TOKENS)
        facts = replace(facts, max_tokens=MAX_TOKENS, expected_tokens=expected, time_left_s=math.inf)
        return self.policy.place(facts, self.cluster.view(), self.params, self._clock(), self.policy_rng)


@dataclass(slots=True, eq=False)
class Client:
    """Keeps the times that a client would see."""

    outcome: Outcome
    loop: EventLoop
    ended: Callable[[], None]
    index_of: Callable[[WorkerKey], int]
    last_s: float = 0.0
    gaps_ms: list[float] = field(default_factory=list)

    def started(self, life: Life) -> None:
        o, route = self.outcome, life.route
        o.rule, o.split, o.decode = route.rule, route.split, self.index_of(route.decode)
        o.prefill = -1 if route.prefill is None else self.index_of(route.prefill)
        o.predicted_ttft_ms = route.estimates["ttft_ms"]

    def token(self, position: int, token_id: int, text: str, logprobs: object | None) -> None:
        now = self.loop.now
        if position == 0:
            self.outcome.first_token_s = now
        else:
            self.gaps_ms.append((now - self.last_s) * 1e3)
        self.last_s = now

    def finished(self, life: Life, reason: Finish) -> None:
        o = self.outcome
        o.finished_s = self.last_s
        o.worst_gap_ms = worst_ms(self.gaps_ms)
        o.cached_tokens, o.moves = life.cached_tokens, life.recoveries
        if o.split and self.gaps_ms:
            o.handoff_gap_ms = self.gaps_ms[0]
        self.ended()

    def failed(self, life: Life, failure: Failure) -> None:
        self.outcome.refused = True
        self.ended()

    def wake(self) -> None:
        pass
