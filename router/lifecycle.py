"""One request's life: messages in, effects out. No IO, no clock. docs/lifecycle.md draws it.

    LOCAL   one leg: decode computes the prompt and answers
    SPLIT   two legs at the same moment: prefill computes and samples the next token; decode pulls the KV and goes on

What was emitted is law: a token is accepted only at the next position. Lower positions are duplicates (a decode worker
repeats what it adopted) and are dropped, if they say the same; a higher one is a gap. A gap or a contradiction fails
its leg. Every recovery goes on from prompt + emitted tokens, with the same seed, so no position is sampled twice.

The ladder, in the order of what is tried, inside the request's deadline:
    source lost      another prefill worker, if that is quicker than the rest on decode    (Follow)
                     else decode keeps what arrived and computes the rest                  (ContinueLocally)
    no room          another decode worker takes over the same lease                       (StartLeg)
    two crashes      an explicit error: it may be why                                      (router/placement/crashes.py)
    decode lost      another decode worker takes over the lease, if it still stands
                     else the request is placed anew
    nobody there     wait for a worker, `recovery_wait_s` at most
    nothing left     an explicit error

While it runs, an answer may go on elsewhere (`migrate`): the target follows a handoff of what stands at the source,
which goes on until the target has it, hands the rest over at a token boundary, and the target goes on. Until then any
failure of the target leaves everything as it was; a failure of the source is a lost source as above.

The first move of a request is free, later ones come out of a budget that all requests share: a fault must not be
answered by a storm.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from router.breakdown import DONE, Breakdown, FirstStep, Migration, RecoveryKind
from router.effects import Client, Planner, Workers
from router.errors import Code, Failure
from router.legs import Handoff, Leg, LegRole, RecoveryLimits, Text, Timeline, too_late
from router.placement.crashes import Crash
from router.placement.policy import Rejection, Route, WorkerKey
from router.prompt_logprobs import PromptLogprobs
from router.request import Finish, LegStart, Request

# A decode worker's word on the request itself: another one would say the same. (INTERNAL: it cannot be computed.)
_FINAL = (Code.INVALID_ARGUMENT, Code.DEADLINE_EXCEEDED, Code.INTERNAL)


class Life:
    """`handoff_prefix` is unique to this router's process: ids of another router, or of one before, never meet ours."""

    def __init__(
        self,
        request: Request,
        route: Route,
        *,
        workers: Workers,
        client: Client,
        text: Text,
        leg_numbers: itertools.count[int],
        handoff_prefix: str,
        planner: Planner,
        limits: RecoveryLimits,
    ) -> None:
        self.request = request
        self.routes = [route]  # the first, and those that followed a fault
        self.emitted: list[int] = list(request.emitted)
        self.resumed_text = ""
        self.prompt_logprobs: PromptLogprobs | None = None  # router/scored_life.py
        self.cached_tokens = 0
        self.recoveries = 0
        self.duplicates = 0
        self.kv_early_share = 0.0
        self.adopt_ms = 0.0
        self.times = Timeline()
        self.breakdown = Breakdown()
        self.crashes: list[Crash] = []  # of workers that computed for it
        self.over = False
        self.outcome = "running"
        self.failure: Failure | None = None
        self._workers = workers
        self._client = client
        self._text = text
        self._leg_numbers = leg_numbers
        self._handoff_prefix = handoff_prefix
        self._planner = planner
        self._limits = limits
        self._moves = 0
        self._failed_workers: set[WorkerKey] = set()
        self._legs: dict[int, Leg] = {}
        self._handoff: Handoff | None = None
        self._waiting_since: float | None = None
        self._waits = 0
        self._trouble = ("", Code.UNAVAILABLE, False)  # of the last `_elsewhere`

    @property
    def route(self) -> Route:
        """Where it runs now."""
        return self.routes[-1]

    # Messages in.

    def start(self, now: float) -> None:
        self.times.dispatched = now
        for token_id in self.emitted:
            self.resumed_text += self._text.push(token_id)
            if self._text.stopped:
                break
        self._client.started(self)
        if self._text.stopped:
            self._finish(Finish.STOP, now)
        elif not self._finish_if_complete(now):  # only a resumed answer can be: its last word was lost
            self._dispatch(now)

    def placed(self, placed: Route | Rejection, now: float) -> None:
        """Instead of `start`: it has waited for another answer to its prompt (router/forks.py)."""
        if isinstance(placed, Route):
            self.routes = [placed]
            self.start(now)
        else:
            self.times.dispatched = now
            self._client.started(self)
            self._elsewhere(placed.failure.message, placed.failure.code, now, free=True)

    def on_token(self, leg_number: int, position: int, token_id: int, logprobs: object | None, now: float) -> None:
        leg = self._legs.get(leg_number)
        if leg is None or self.over:
            return
        expected = len(self.emitted)
        if position < expected:
            self.duplicates += 1
            if self.emitted[position] != token_id:
                self._cancel(leg, "it contradicts itself")
                why = f"token {token_id} came at position {position} where {self.emitted[position]} was sent already"
                self._leg_failed(leg, why, now)
            return
        if position > expected:
            self._cancel(leg, "it left a gap")
            self._leg_failed(leg, f"position {position} came where {expected} was due", now)
            return
        self.emitted.append(token_id)
        if self.breakdown.recovering:
            self.breakdown.went_on(now, self.times.last_token or now)
        times = self.times
        times.last_token = now
        resumed = len(self.request.emitted)
        if expected == resumed:
            times.first_token = now
            self._workers.computed(leg.worker, leg.number)
        elif expected == resumed + 1:
            times.second_token = now
        text = self._text.push(token_id)
        self._client.token(position, token_id, text, logprobs)
        if self._text.stopped:
            self._finish(Finish.STOP, now)

    def on_prompt_logprobs(self, leg_number: int, message: Any, now: float) -> None: ...  # router/scored_life.py

    def on_end(self, leg_number: int, reason: Finish | None, cached_tokens: int, now: float) -> None:
        """`reason` None: a leg handed over; the lease stands."""
        leg, handoff = self._legs.get(leg_number), self._handoff
        if leg is None or self.over:
            return
        if leg.tells_cached:
            self.cached_tokens = cached_tokens
        self._drop(leg)
        if reason is not None:
            self._finish(reason, now)
        elif handoff is not None and handoff.leg == leg_number:
            handoff.handed_over = True
        elif leg.role is LegRole.DECODE:  # our word to keep it came too late
            self._workers.cancel(leg.worker, leg.number, "nobody takes it over")
            self._elsewhere("it was handed over, and nobody took it", Code.UNAVAILABLE, now, free=True)

    def on_error(self, leg_number: int, code: Code, message: str, now: float) -> None:
        """A worker ended a leg with an error."""
        leg = self._legs.get(leg_number)
        if leg is None or self.over:
            return
        self._drop(leg)
        if leg.role is LegRole.DECODE and not leg.adopted and self._stays(message):
            return
        if code in _FINAL and leg.role is LegRole.DECODE:
            asked = code is Code.INVALID_ARGUMENT and "`structured`" in message
            self._fail(Failure(code, message, field="structured" if asked else ""), now)
        else:
            self._leg_failed(leg, message, now, code=code)

    def on_handoff_failed(
        self, leg_number: int, handoff_id: str, reason: str, detail: str, kept_tokens: int, now: float
    ) -> None:
        """Decode could not adopt; it waits for what we decide."""
        leg, handoff = self._legs.get(leg_number), self._handoff
        if leg is None or self.over or handoff is None or handoff.handoff_id != handoff_id:
            return
        if self._finish_if_complete(now):
            return
        why = f"handoff failed: {reason} {detail}".strip()
        if self._stays(why):
            return
        if reason == "no_room":
            reader = self._reader_elsewhere(handoff, now, besides=leg.worker)
            if reader is not None:
                self._failed_workers.add(leg.worker)
                self._cancel(leg, why, keep_lease=True)
                self._read_elsewhere(handoff, reader, now)
                return
            self._end_handoff(why)
            self._recovered(RecoveryKind.COMPUTED_REST, now)
            self._compute_rest(leg)  # it stays there after all, and waits for room
            return
        self._failed_workers.add(handoff.source)
        if reason == "peer_lost":
            self.crashes.append(Crash(handoff.source, now, len(self.emitted), hearsay=True))
        self._source_lost(leg, why, kept_tokens, now)

    def on_adopted(
        self,
        leg_number: int,
        handoff_id: str,
        kv_early_share: float,
        adopt_ms: float,
        now: float,
        pulled_bytes: int = 0,
    ) -> None:
        leg = self._legs.get(leg_number)
        if leg is None or self.over:
            return
        leg.adopted = True
        handoff, self._handoff = self._handoff, None
        if handoff is not None and handoff.migration is not None:
            self._arrived(leg, handoff.migration, pulled_bytes, now)
        else:
            self.kv_early_share, self.adopt_ms = kv_early_share, adopt_ms
        self._workers.computed(leg.worker, leg.number)
        prefill = self._find(LegRole.PREFILL)
        if prefill is not None and handoff is not None and handoff.handoff_id != handoff_id:
            self._cancel(prefill, "decode had adopted already")  # our word to follow another source came too late

    # Going on elsewhere.

    def migrate(self, target: WorkerKey, spare_tokens: int, pull_bytes: int, why: str, now: float) -> str:
        """Begin to move a running answer; the source samples `spare_tokens` more at most. Empty: it is under way; else
        why not.
        """
        leg = self._find(LegRole.DECODE)
        if leg is None or not self.movable:
            return "it does not decode on one worker now: it waits, is being handed over, or has no token yet"
        if leg.worker == target:
            return "it runs there already"
        known = len(self.request.prompt) + len(self.emitted)
        longest = len(self.request.prompt) + self.request.sampling.max_tokens
        reader = self._leg(LegRole.DECODE, target)
        leg.role = LegRole.PREFILL  # from here on it is a source
        migration = Migration(leg.worker, target, why, now)
        self.breakdown.migrations.append(migration)
        handoff = self._handoff = Handoff(
            f"{self._handoff_prefix}/{reader.number}",
            leg.worker,
            leg.number,
            tuple(self.emitted),
            migration=migration,
            most_tokens=max(known, min(known + spare_tokens, longest)),
            pull_bytes=pull_bytes,
        )
        self._workers.start(target, self._pulling(reader, handoff), 0)
        self._workers.serve(leg.worker, leg.number, handoff.handoff_id, handoff.most_tokens)
        return ""

    def on_caught_up(self, leg_number: int, handoff_id: str, now: float) -> None:
        """The target has all that stands: from here on each further token would only add to the rest."""
        handoff = self._handoff
        if leg_number not in self._legs or self.over or handoff is None or handoff.handoff_id != handoff_id:
            return
        migration = handoff.migration
        if migration is not None and migration.frozen_at is None:
            migration.frozen_at = now
            self._workers.freeze(handoff.source, handoff.leg, handoff_id)

    def stay(self, why: str) -> bool:
        """Give up a migration; False: there is none, or the source has handed over already."""
        return not self.over and self._stays(why)

    def _stays(self, why: str) -> bool:
        """A target that fails while the source goes on: nothing has happened to the answer."""
        handoff = self._handoff
        source = self._legs.get(handoff.leg) if handoff is not None and handoff.migration is not None else None
        if handoff is None or source is None:
            return False
        handoff.lapse(why)
        self._handoff = None
        source.role = LegRole.DECODE
        for leg in list(self._legs.values()):
            if leg is not source:
                self._cancel(leg, why)
        self._workers.keep(source.worker, source.number, handoff.handoff_id)
        return True

    def _arrived(self, leg: Leg, migration: Migration, pulled_bytes: int, now: float) -> None:
        migration.outcome, migration.adopted_at, migration.pulled_bytes = DONE, now, pulled_bytes
        self.breakdown.recovering = True
        self.routes.append(replace(self.route, decode=leg.worker, rule=f"migrated: {migration.why}"))

    @property
    def movable(self) -> bool:
        """It decodes on one worker, and nothing moves it."""
        alone = len(self._legs) == 1 and self._handoff is None and not self.over
        return alone and bool(self.emitted) and next(iter(self._legs.values())).adopted

    @property
    def migrating(self) -> Migration | None:
        return None if self._handoff is None else self._handoff.migration

    def only_arrives(self, leg_number: int) -> bool:
        """The answer runs elsewhere, and may go on there: this leg has computed nothing for it."""
        handoff = self._handoff
        return handoff is not None and handoff.under_way and leg_number != handoff.leg in self._legs

    @property
    def moved(self) -> bool:
        """What was expected of its first placement says nothing about what came."""
        return self.recoveries > 0 or bool(self.breakdown.migrations)

    def on_worker_lost(self, leg_number: int, why: str, now: float, given_up: str = "") -> None:
        """`given_up`: why the request is not to go on anywhere, if so."""
        leg = self._legs.get(leg_number)
        if leg is None or self.over:
            return
        self._drop(leg)
        if given_up and not self._finish_if_complete(now):
            self._fail(Failure(Code.INTERNAL, given_up), now)
        if self.over:
            return
        self._leg_failed(leg, f"{leg.worker.worker_id} was lost: {why}", now)

    def on_retry(self, now: float) -> None:
        """A wait for a worker is over."""
        if not self.over and self._waiting_since is not None:
            self._failed_workers.clear()  # they may be well again
            self._elsewhere(*self._trouble[:2], now, free=self._trouble[2])

    def cancel(self, now: float) -> None:
        if not self.over:
            self._finish(Finish.CANCELLED, now)

    def on_deadline(self, now: float) -> None:
        if not self.over:
            self._fail(too_late(self.request.deadline - self.request.arrived, len(self.emitted)), now)

    def fail(self, failure: Failure, now: float) -> None:
        if not self.over:
            self._fail(failure, now)

    def on_first_step(self, leg_number: int, said: FirstStep) -> None:
        """A worker's word on the first token that it sampled for a leg; the token follows."""
        if leg_number in self._legs and not self.over:
            self.breakdown.first_step(leg_number, said, self.answered_tokens)

    @property
    def answered_tokens(self) -> int:
        """Without those that the request brought along."""
        return len(self.emitted) - len(self.request.emitted)

    def ttft_parts_ms(self) -> dict[str, float]:
        return self.breakdown.ttft_parts_ms(self.request.arrived, self.times.dispatched, self.times.first_token)

    @property
    def legs(self) -> Sequence[Leg]:
        return tuple(self._legs.values())

    # Dispatch.

    def _dispatch(self, now: float) -> None:
        emitted = tuple(self.emitted)
        route = self.route
        uncached = int(route.estimates.get("uncached_on_decode_tokens", len(self.request.prompt)))
        decode = self._leg(LegRole.DECODE, route.decode)
        if route.prefill is None:
            decode.adopted, decode.tells_cached = True, not self.routes[0].split
            start = LegStart(decode.number, self.request, emitted, **self._computing(decode.number))
            self._workers.start(route.decode, start, uncached)
            return
        handoff = self._open_handoff(route.prefill)
        self._workers.start(route.decode, self._pulling(decode, handoff), 0)

    def _computing(self, leg_number: int) -> dict[str, Any]:
        """What the leg that computes the prompt is told beside it."""
        route, pull = self.route, self.route.pull
        return {
            "prefix": None if pull is None else (f"{self._handoff_prefix}/{leg_number}/prefix", pull),
            # A recovery is late by no fault of its own: it takes its turn by arrival.
            "due_ms": route.estimates.get("due_ms") if not self.recoveries else None,
            "put_back_weight": route.estimates.get("put_back_weight", 1.0),
            "incoming_bytes": 0 if pull is None else int(route.estimates.get("pull_bytes", 0)),
            "acceptance": self.breakdown.acceptance,
        }

    def _pulling(self, leg: Leg, handoff: Handoff) -> LegStart:
        """What a decode leg that takes the KV over is told."""
        return LegStart(
            leg.number,
            self.request,
            handoff.emitted,
            pull=(handoff.handoff_id, handoff.source),
            incoming_bytes=handoff.pull_bytes or int(self.route.estimates.get("transfer_bytes", 0)),
            most_tokens=handoff.most_tokens,
            acceptance=self.breakdown.acceptance,
        )

    def _open_handoff(self, source: WorkerKey) -> Handoff:
        """Start the prefill leg of a new handoff."""
        leg = self._leg(LegRole.PREFILL, source)
        leg.tells_cached = True
        name, told = f"{self._handoff_prefix}/{leg.number}", self._computing(leg.number)
        handoff = self._handoff = Handoff(name, source, leg.number, tuple(self.emitted))
        start = LegStart(leg.number, self.request, handoff.emitted, name, **told)
        known = len(self.request.prompt) + len(self.emitted)
        self._workers.start(source, start, int(self.route.estimates.get("uncached_on_prefill_tokens", known)))
        return handoff

    def _leg(self, role: LegRole, worker: WorkerKey) -> Leg:
        leg = Leg(next(self._leg_numbers), role, worker)
        self._legs[leg.number] = leg
        return leg

    # Trouble.

    def _leg_failed(self, leg: Leg, why: str, now: float, code: Code = Code.UNAVAILABLE) -> None:
        """The leg itself is dropped already."""
        self._failed_workers.add(leg.worker)
        if self._finish_if_complete(now):
            return
        if leg.role is LegRole.PREFILL:
            decode = self._find(LegRole.DECODE)
            if decode is not None and not decode.adopted:
                self._source_lost(decode, why, 0, now)
                return
            if decode is not None:
                return  # it has everything
        elif self._handoff is not None and not leg.adopted:
            if self._stays(why):
                return
            reader = self._reader_elsewhere(self._handoff, now, besides=leg.worker)
            if reader is not None:
                self._read_elsewhere(self._handoff, reader, now)
                return
        self._elsewhere(why, code, now)

    def _source_lost(self, decode: Leg, why: str, kept_tokens: int, now: float) -> None:
        """Another source if that is quicker, else decode computes what is missing: it can always do that."""
        self._end_handoff(why)
        if self._may_move(now):
            exclude, mix = frozenset(self._failed_workers), self.breakdown.mix
            exclude |= frozenset() if mix.kv else self._planner.unlike(mix.layout)  # names of its blocks stand already
            emitted = len(self.emitted)
            route = self._planner.another_source(self.request, emitted, decode.worker, kept_tokens, exclude)
            if route is not None and route.prefill is not None:
                self._recovered(RecoveryKind.ANOTHER_SOURCE, now)
                self._moved(now)
                self.routes.append(replace(route, rule=f"recovered: {route.rule}"))
                handoff = self._open_handoff(route.prefill)
                pull = (handoff.handoff_id, handoff.source)
                self._workers.follow(decode.worker, decode.number, handoff.emitted, pull)
                return
        self._recovered(RecoveryKind.COMPUTED_REST, now)
        if self.route.decode != decode.worker:  # it was on its way there
            self.routes.append(replace(self.route, decode=decode.worker, rule="recovered: its source is lost"))
        self._compute_rest(decode)

    def _compute_rest(self, decode: Leg) -> None:
        decode.adopted = True
        self._workers.continue_locally(decode.worker, decode.number, tuple(self.emitted))

    def _reader_elsewhere(self, handoff: Handoff, now: float, besides: WorkerKey) -> WorkerKey | None:
        """Who could take over a lease that still stands."""
        if handoff.source in self._failed_workers or not self._may_move(now):
            return None
        return self._planner.another_reader(self.request, handoff.source, frozenset({*self._failed_workers, besides}))

    def _read_elsewhere(self, handoff: Handoff, reader: WorkerKey, now: float) -> None:
        self._recovered(RecoveryKind.ANOTHER_READER, now)
        self._moved(now)
        self.routes.append(replace(self.route, decode=reader, rule="recovered: same_lease_another_reader"))
        self._workers.start(reader, self._pulling(self._leg(LegRole.DECODE, reader), handoff), 0)

    def _end_handoff(self, why: str) -> None:
        """Nobody will adopt it: the prefill leg ends, or, if it has handed over, the lease that it left."""
        handoff, self._handoff = self._handoff, None
        if handoff is not None:
            handoff.lapse(why)
        prefill = self._find(LegRole.PREFILL)
        if prefill is not None:
            self._cancel(prefill, why)
        elif handoff is not None and handoff.handed_over:
            self._workers.cancel(handoff.source, handoff.leg, why)

    def _elsewhere(self, why: str, code: Code, now: float, *, free: bool = False) -> None:
        """No leg is of use any more: the request is placed anew. `free`: our own doing, which no limit counts."""
        self._end_handoff(why)
        for leg in list(self._legs.values()):
            self._cancel(leg, why)
        self._trouble = (why, code, free)
        if not free and self._moves + 1 >= self._limits.max_attempts:
            self._fail(Failure(code, f"given up after {self._moves + 1} attempts; the last: {why}", 1000), now)
            return
        if not free and not self._may_move(now):
            self._wait("many requests are being moved", now)
            return
        failed, mix = frozenset(self._failed_workers), self.breakdown.mix
        unlike = self._planner.unlike(mix.layout) if self.emitted and not mix.mixed else frozenset()
        placed = self._planner.place(self.request, len(self.emitted), failed | unlike)
        if unlike and isinstance(placed, Rejection):  # of its own scheme nobody is left
            placed = self._planner.place(self.request, len(self.emitted), failed)
        if isinstance(placed, Rejection):
            hint = placed.failure
            if code is Code.UNAVAILABLE and hint.code is Code.UNAVAILABLE:
                self._wait(hint.message, now)
                return
            message = f"{why}; no other worker: {hint.message}"
            self._fail(Failure(code, message, max(hint.retry_after_ms, 1000)), now)
            return
        self._waiting_since = None
        self._recovered(RecoveryKind.PLACED_ANEW, now)
        if not free:
            self._moved(now)
        self.routes.append(replace(placed, rule=f"recovered: {placed.rule}"))
        self._dispatch(now)

    def _recovered(self, kind: RecoveryKind, now: float) -> None:
        self.recoveries += 1
        self.breakdown.recovered(kind, now)

    def _may_move(self, now: float) -> bool:
        if self._moves + 1 >= self._limits.max_attempts:
            return False
        return self._moves == 0 or self._planner.may_retry(now)

    def _moved(self, now: float) -> None:
        if self._moves:
            self._planner.retried(now)
        self._moves += 1

    def _wait(self, hint: str, now: float) -> None:
        if self._waiting_since is None:
            self._waiting_since, self._waits = now, 0
        if now - self._waiting_since >= self._limits.wait_s:
            why, code, _ = self._trouble
            waited = f"nothing came free within {self._limits.wait_s:g} s"
            self._fail(Failure(code, f"{why}; {waited}: {hint}", 1000), now)
            return
        self._workers.retry_later(self.request.key, self._planner.backoff_s(self._waits))
        self._waits += 1

    def _finish_if_complete(self, now: float) -> bool:
        """The last token was there, only the word that it was the last is lost: nothing is left to compute."""
        sampling, emitted = self.request.sampling, self.emitted
        if emitted and len(emitted) > sampling.min_tokens and emitted[-1] in sampling.stop_token_ids:
            self._finish(Finish.STOP, now)
        elif emitted and len(emitted) >= sampling.max_tokens:
            self._finish(Finish.LENGTH, now)
        return self.over

    def _find(self, role: LegRole) -> Leg | None:
        return next((leg for leg in self._legs.values() if leg.role is role), None)

    # Ends.

    def _finish(self, reason: Finish, now: float) -> None:
        rest = self._text.flush()
        self._close(reason.value, now)
        if rest:
            # Text that was held back belongs to the last token; it travels with no token of its own.
            self._client.token(len(self.emitted), -1, rest, None)
        self._client.finished(self, reason)

    def _fail(self, failure: Failure, now: float) -> None:
        self.failure = failure
        self._close(failure.code.name, now)
        self._client.failed(self, failure)

    def _close(self, outcome: str, now: float) -> None:
        self.over = True
        self.outcome = outcome
        self.times.ended = now
        self._end_handoff(outcome)
        for leg in list(self._legs.values()):
            self._cancel(leg, outcome)

    def _cancel(self, leg: Leg, reason: str, *, keep_lease: bool = False) -> None:
        self._workers.cancel(leg.worker, leg.number, reason, keep_lease)
        self._drop(leg)

    def _drop(self, leg: Leg) -> None:
        if self._legs.pop(leg.number, None) is not None:
            self._workers.ended(leg.worker, leg.number)
