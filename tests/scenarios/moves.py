"""Running answers that go on elsewhere: every third seed asks for it at odd moments, and drains workers that decode.

In half of those seeds nothing goes wrong (`calm`): then a move either arrives or leaves its answer where it was, and is
no recovery, and nothing that was announced turns out to be something else.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from router.breakdown import Migration
from router.lifecycle import Life
from router.moves import _COOL_DOWN_S, _NOT_THERE_S
from router.placement import moves
from router.placement.cluster import Role
from router.placement.moves import Reason
from tests.scenarios.nodes import SimWorker, World

# A word to stay may find that the source has handed over; and so does a word to go elsewhere that follows it.
_LATE = (
    "given up by hand",
    "handoff failed: source_failed the sequence has ended here",
    "handoff failed: no_room",
    "handoff failed: timeout",  # the weather's
    "source_failed: ",  # others took the room of the last blocks between the word to freeze and the token
)
_SOURCE, _TOOK_ROOM = "handoff failed: source_failed ", "blocks are leased already"  # the same, heard from the target
# Of handoffs: what only a fault, or a reader or source that has no room, explains.
_WRONG = ("stale_epoch", "unknown_handoff", "peer_lost", "layout_mismatch", "transport_error")


def has_moves(seed: int) -> bool:
    return seed % 3 == 1


def is_calm(seed: int) -> bool:
    return seed % 6 == 4


@dataclass
class Moving:
    """Of one scenario. Its draws are of its own: the others stay as they are."""

    seed: int
    world: World
    busy: Callable[[], bool]  # answers are still to come
    rng: random.Random = field(init=False)
    drained: list[str] = field(default_factory=list)
    recovered: list[str] = field(default_factory=list)  # after a move that did not arrive, by why

    def __post_init__(self) -> None:
        self.rng = random.Random(f"moves {self.seed}")
        self.every_s = self.rng.choice((0.005, 0.02, 0.1))
        self.spare_tokens = self.rng.choice((3, 16, 64))
        self.longest = self.rng.choice((60, 100, 250))
        self.by_hand = self.rng.random() < 0.8
        self.share_long = 0.5  # of answers
        self.worth = moves.WORTH

    def patched(self) -> Any:
        """Answers here last a second or two, and their moves milliseconds."""
        stack = contextlib.ExitStack()
        quick = {"LEAST_REST_MS": 30.0, "SPARE_TOKENS": self.spare_tokens, "WORTH": self.worth}
        stack.enter_context(mock.patch.multiple("router.placement.moves", **quick))
        stack.enter_context(mock.patch.object(Life, "_recovered", self._noting(Life._recovered)))
        stack.enter_context(mock.patch.object(Life, "on_caught_up", self._wavering(Life.on_caught_up)))
        return stack

    def _wavering(self, on_caught_up: Callable[..., None]) -> Callable[..., None]:
        """At times a word to stay follows the word to freeze, in one message."""

        def wavers(life: Life, *args: Any) -> None:
            on_caught_up(life, *args)
            migration = life.migrating
            if migration is not None and migration.frozen_at is not None and self.rng.random() < 0.1:
                life.stay("given up by hand")

        return wavers

    def _noting(self, recovered: Callable[..., None]) -> Callable[..., None]:
        def noted(life: Life, *args: Any) -> None:
            if life.breakdown.migrations and life.breakdown.migrations[-1].outcome != "done":
                self.recovered.append(life.breakdown.migrations[-1].outcome)
            recovered(life, *args)

        return noted

    def begin(self) -> None:
        if self.by_hand:
            self.world.clock.at(self.every_s, self._move_one)

    def _again(self) -> None:
        if self.busy():
            self.world.clock.at(self.every_s * self.rng.uniform(0.5, 1.5), self._move_one)

    def _move_one(self) -> None:
        self._again()
        rng, routers = self.rng, list(self.world.routers.values())
        if not routers:
            return
        dispatcher = rng.choice(routers).dispatcher
        if rng.random() < 0.05:
            self._give_one_up(dispatcher)
            return
        lives = [
            live for live in dispatcher._live.values() if live.life.movable and live.life.answered_tokens > 1
        ]  # the others mostly wait
        target = rng.choice(dispatcher.cluster.ready(Role.DECODE) or [None])
        if target is not None and lives:
            live = rng.choice(lives)
            why_not = dispatcher.moves.move(live, target.key)
            name = live.life.request.request_id
            self.world.say(f"{name} is to go to {target.key.worker_id}: {why_not or 'begun'}")

    def _give_one_up(self, dispatcher: Any) -> None:
        moving = [live for live in dispatcher._live.values() if live.life.migrating is not None]
        if moving:
            live = self.rng.choice(moving)
            self.world.say(f"{live.life.request.request_id} is to stay")
            dispatcher._tell(live, lambda life, now: life.stay("given up by hand"))
            dispatcher.flush()

    def drain(self, worker: SimWorker, then: Callable[[], None]) -> None:
        self.drained.append(worker.peer.worker_id)
        worker.drain(then)

    # What must be true.

    def problem(self, moves: Sequence[Migration]) -> str:
        """Of one answer's, whoever wanted them."""
        for before, move in itertools.pairwise(moves):
            if move.why == Reason.ASKED or before.why == Reason.ASKED:
                continue
            back = move.target == before.source and move.at - before.at < _COOL_DOWN_S
            again = move.target == before.target and move.at - before.at < _NOT_THERE_S
            if back or again:
                return f"it is sent to {move.target} once more"
        return ""

    def disturbed(self, workers: Sequence[SimWorker]) -> str:
        """Of a calm seed: what took a fault, and there was none."""
        for why in self.recovered:
            if not why.startswith(_LATE) and not (why.startswith(_SOURCE) and _TOOK_ROOM in why):
                return f"a move that did not arrive became a recovery: {why}"
        for worker in workers:
            wrong = {reason: n for reason in _WRONG if (n := worker.core.outcomes[reason])}
            if wrong:
                return f"{worker.peer.worker_id}: handoffs failed without a fault: {wrong}"
        return ""
