"""Which running answers go on elsewhere, and where: off workers that leave decoding, off those short of KV, and off
those whose steps take much longer than another's.

A move is priced: what must be pulled, against what is left to do. A short rest ends where it is. One that only makes
its answer quicker must win several times what it costs. One answer at a time comes to a worker, so that two never fight
for the room that each was promised. Pure; `Moves` (router/moves.py) acts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from router.placement.view import WorkerKey, WorkerView

SPARE_TOKENS = 64  # that a source may sample while its KV is pulled, at least
MOST_SPARE_TOKENS = 2048
WORTH = 2.0  # a rest shorter than so many times its own move ends where it is
LEAST_REST_MS = 500.0
ROOM_LEFT = 0.1  # of a target's pool, after a move that relieves another worker
BEHIND = 1.5  # a step so many times another's, with one sequence more there, is too long
GAIN = 4.0  # so many times what it costs must a move win that nothing but time asks for
_PAUSE_STEPS = 3.0  # that a move costs its stream
_STEP_MS = 50.0  # of a worker that has measured none
_PARALLEL_OUT = 4  # moves off one worker at a time: its link is shared


class Reason:
    LEAVES = "its worker leaves"
    SWITCHES = "its worker takes another part"
    PRESSURE = "its worker is short of KV"
    BALANCE = "its worker is slower than another"
    ASKED = "asked for"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A running answer. `left_tokens`: expected still to come. `not_to`: where it came from or failed to go lately."""

    key: str
    known_tokens: int
    left_tokens: int
    priority: int = 0
    not_to: frozenset[WorkerKey] = frozenset()


@dataclass(frozen=True, slots=True)
class Source:
    """A worker that answers are to leave, or some of them. `all_of_them`: else only as many as relieve it, or for
    balance one at a time.
    """

    key: WorkerKey
    layout_fingerprint: str
    reason: str
    step_ms: float
    under_way: int  # moves off it
    all_of_them: bool
    candidates: Sequence[Candidate]
    relief_tokens: int = 0  # of KV, where not all are to leave
    running: int = 0  # sequences that share its steps

    @property
    def for_balance(self) -> bool:
        return self.reason == Reason.BALANCE


class Move(NamedTuple):
    """`estimates` by name with unit, as those of a Route."""

    key: str
    target: WorkerKey
    spare_tokens: int
    pull_bytes: int
    reason: str
    estimates: dict[str, float]


@dataclass(slots=True)
class _Room:
    view: WorkerView
    free_tokens: int
    taken: bool = False


@dataclass(slots=True)
class Offers:
    """Where answers could go: workers that decode, one inbound move each."""

    views: Iterable[WorkerView]
    inbound: Collection[WorkerKey]  # something is on its way there already
    broken_paths: Collection[tuple[WorkerKey, WorkerKey]] = ()
    _rooms: list[_Room] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rooms = [_Room(v, v.free_tokens, v.key in self.inbound) for v in self.views]

    def best(self, source: Source, one: Candidate) -> _Room | None:
        """The least loaded one that has room."""

        def fits(room: _Room) -> bool:
            view = room.view
            spared = 0 if source.all_of_them else int(view.total_tokens * ROOM_LEFT)
            return (
                not room.taken
                and view.key != source.key
                and view.key not in one.not_to
                and view.layout_fingerprint == source.layout_fingerprint
                and (source.key, view.key) not in self.broken_paths
                and room.free_tokens - spared >= one.known_tokens + SPARE_TOKENS
            )

        able = [
            room for room in self._rooms if fits(room) and (not source.for_balance or _is_quicker(room.view, source))
        ]
        return min(able, key=lambda room: (_step_ms(room.view), -room.free_tokens), default=None)


def choose(sources: Iterable[Source], offers: Offers) -> list[Move]:
    moves: list[Move] = []
    for source in sources:
        room_out = _PARALLEL_OUT - source.under_way
        relief = source.relief_tokens
        if source.for_balance:
            room_out, relief = (0, 0) if source.under_way else (1, 1)
        for one in sorted(source.candidates, key=lambda c: _order(c, source), reverse=True):
            if room_out <= 0 or (not source.all_of_them and relief <= 0):
                break
            room = offers.best(source, one)
            if room is None:
                continue
            move = priced(one, source, room.view)
            if move is None:
                continue
            room.taken = True
            room_out -= 1
            relief -= one.known_tokens
            moves.append(move)
    return moves


def priced(one: Candidate, source: Source, target: WorkerView, *, at_any_price: bool = False) -> Move | None:
    """None: it ends before it has been worth it."""
    step_ms = source.step_ms or _step_ms(target)
    pull_bytes = one.known_tokens * target.block_bytes // target.block_tokens + target.fixed_bytes
    pull_ms = pull_bytes / target.pull_rate * 1e3
    rest_ms = one.left_tokens * step_ms
    if not at_any_price and rest_ms < max(LEAST_REST_MS, WORTH * pull_ms):
        return None
    if source.for_balance:
        won_ms = one.left_tokens * (step_ms - _step_there_ms(target, source))
        if won_ms < GAIN * (pull_ms + _PAUSE_STEPS * step_ms):
            return None
    spare = min(MOST_SPARE_TOKENS, SPARE_TOKENS + int(2 * pull_ms / step_ms))
    estimates = {
        "pull_bytes": float(pull_bytes),
        "pull_ms": pull_ms,
        "rest_ms": rest_ms,
        "step_ms_there": _step_ms(target),
        "free_tokens_there": float(target.free_tokens),
    }
    return Move(one.key, target.key, spare, pull_bytes, source.reason, estimates)


def _order(one: Candidate, source: Source) -> tuple[float, ...]:
    """The longest rest first, where all are to leave; else most rest for its bytes, lower priorities first."""
    if source.all_of_them:
        return (one.left_tokens,)
    return (-one.priority, one.left_tokens / max(1, one.known_tokens))


def behind(views: Sequence[WorkerView]) -> set[WorkerKey]:
    """Whose steps are too long beside the quickest worker's; a cheap look: which answers go, and whether, is priced."""
    steps = [_step_ms(view) if view.running_sequences else 0.0 for view in views]
    quickest = min(steps, default=0.0)
    return {v.key for v, ms in zip(views, steps, strict=True) if v.running_sequences > 1 and ms > BEHIND * quickest}


def _is_quicker(view: WorkerView, source: Source) -> bool:
    return source.step_ms > BEHIND * _step_there_ms(view, source)


def _step_there_ms(view: WorkerView, source: Source) -> float:
    """With one sequence more. What an idle worker measured last says nothing: half of a step is taken to be shared by
    all, half to grow with the sequences, as views do.
    """
    if view.running_sequences:
        return _step_ms(view)
    return source.step_ms * (0.5 + 0.5 / max(1, source.running))


def _step_ms(view: WorkerView) -> float:
    return view.itl_ms or view.raw_itl_ms or _STEP_MS
