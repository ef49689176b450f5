"""The life of a request whose answers are searched for (engine/beam_search.py).

The search runs on the decode worker alone, and says nothing until it is over: no token is sent before, so a failure, or
a worker that is lost, costs the search and nothing else. It begins again elsewhere, within the limits of any recovery,
and it never moves while it runs. A prefill worker computes the prompt and hands it over; the token that it samples is
dropped, and the decode worker computes the prompt's last block once more.

Further answers to the prompt wait for the first (router/forks.py). The one search has found them, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from router.lifecycle import Life
from router.request import Finish, Request
from router.scored_life import life_of as other_life_of


class Found(NamedTuple):
    token_ids: list[int]
    reason: Finish


class BeamLife(Life):
    def __init__(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().__init__(request, *args, **kwargs)
        self.found: list[Found] = []  # best first

    def on_token(self, leg_number: int, position: int, token_id: int, logprobs: object | None, now: float) -> None:
        leg = self._legs.get(leg_number)
        if leg is not None and not self.over:
            self._workers.computed(leg.worker, leg_number)

    def on_beams(self, leg_number: int, message: Any) -> None:
        """`message` as BeamAnswers in worker.proto. The end of the leg follows."""
        if leg_number in self._legs and not self.over:
            self.found = [
                Found(
                    np.frombuffer(one.token_ids[: len(one.token_ids) // 4 * 4], dtype="<u4").tolist(),
                    Finish.STOP if one.stopped else Finish.LENGTH,
                )
                for one in message.answers
            ]

    def on_end(self, leg_number: int, reason: Finish | None, cached_tokens: int, now: float) -> None:
        leg = self._legs.get(leg_number)
        if reason is None or leg is None or self.over:
            super().on_end(leg_number, reason, cached_tokens, now)
            return
        if leg.tells_cached:
            self.cached_tokens = cached_tokens
        self._drop(leg)
        if not self._complete():
            self._leg_failed(leg, "a search ended without its answers", now)
            return
        self._workers.computed(leg.worker, leg_number)
        self._give(self.found[self.request.answer], now)

    def _complete(self) -> bool:
        beams = self.request.sampling.beams
        return beams is not None and len(self.found) == beams.answers and all(one.token_ids for one in self.found)

    def _give(self, found: Found, now: float) -> None:
        self.times.first_token = self.times.last_token = now
        for position, token_id in enumerate(found.token_ids):
            self.emitted.append(token_id)
            self._client.token(position, token_id, self._text.push(token_id), None)
        self._finish(found.reason, now)

    def given(self, first: BeamLife, now: float) -> None:
        """In place of `placed`: by the search of another answer."""
        self.routes, self.found = [first.route], first.found
        self.breakdown.mix = first.breakdown.mix.copy()
        self.times.dispatched = now
        self._client.started(self)
        self._give(self.found[self.request.answer], now)


def life_of(request: Request) -> type[Life]:
    return other_life_of(request) if request.sampling.beams is None else BeamLife
