"""The life of a request that wants log-probabilities of its prompt.

The leg that computes the prompt says them, chunk by chunk, before its first token. Nobody says them again once there is
a token of the answer; so none is taken before all of them are there:

    a token of the leg that computes     all are there, as they are sent in order; else that leg is no good
    a token of the decode leg            it may be quicker than its source, which says them: the token waits
    the source is lost meanwhile         nobody has the rest: the request is placed anew, and computed again
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from router.errors import Code, Failure
from router.legs import Leg, LegRole
from router.lifecycle import Life
from router.prompt_logprobs import PromptLogprobs
from router.request import Finish


class ScoredLife(Life):
    def __init__(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(request, *args, **kwargs)
        self.prompt_logprobs = PromptLogprobs(len(request.prompt), request.sampling.prompt_logprobs)
        self._early: list[Callable[[float], None]] = []

    @property
    def scores(self) -> PromptLogprobs:
        assert self.prompt_logprobs is not None, "it is over"
        return self.prompt_logprobs

    def on_prompt_logprobs(self, leg_number: int, message: Any, now: float) -> None:
        """`message` as PromptLogprobs in generate.proto."""
        leg = self._legs.get(leg_number)
        if self.over or leg is None:
            return
        if why := self.scores.take(message):
            self._cancel(leg, why)
            self._leg_failed(leg, why, now)
        elif self.scores.complete:
            early, self._early = self._early, []
            for call in early:
                call(now)

    def on_token(self, leg_number: int, position: int, token_id: int, logprobs: object | None, now: float) -> None:
        later = partial(super().on_token, leg_number, position, token_id, logprobs)
        if not self._too_early(leg_number, later, now):
            later(now)

    def on_end(self, leg_number: int, reason: Finish | None, cached_tokens: int, now: float) -> None:
        later = partial(super().on_end, leg_number, reason, cached_tokens)
        if not self._too_early(leg_number, later, now):
            later(now)

    def _too_early(self, leg_number: int, later: Callable[[float], None], now: float) -> bool:
        """Whether a word on the answer is not for now."""
        leg = self._legs.get(leg_number)
        if self.over or leg is None or self.scores.complete:
            return False
        if leg.role is LegRole.DECODE and self._find(LegRole.PREFILL) is not None:
            self._early.append(later)
        else:
            self._failed_workers.add(leg.worker)
            self._cancel(leg, "log-probabilities of the prompt are missing")
            self._lost("log-probabilities of the prompt did not come before the first token", now)
        return True

    def _leg_failed(self, leg: Leg, why: str, now: float, code: Code = Code.UNAVAILABLE) -> None:
        decode = self._find(LegRole.DECODE)
        if leg.role is LegRole.PREFILL and decode is not None and decode.adopted and not self.scores.complete:
            self._failed_workers.add(leg.worker)
            self._lost(f"{why}, and with it log-probabilities of the prompt", now)
        else:
            super()._leg_failed(leg, why, now, code)

    def _finish(self, reason: Finish, now: float) -> None:
        super()._finish(reason, now)
        self.prompt_logprobs = None  # the life is remembered for a while; this is not small

    def _fail(self, failure: Failure, now: float) -> None:
        super()._fail(failure, now)
        self.prompt_logprobs = None

    def _lost(self, why: str, now: float) -> None:
        self._early.clear()
        self._elsewhere(why, Code.UNAVAILABLE, now)


def life_of(request: Any) -> type[Life]:
    return ScoredLife if request.needs_whole_prompt else Life
