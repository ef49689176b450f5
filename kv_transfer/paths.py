"""Whether KV moves from each source to this reader: judged by its pulls, and by probes where none moved lately.

    unproven ──success──> ok ──failures in a row──> broken ──successes in a row──> ok
        ^──── the source's stream came back ──── broken <── the source's stream is lost ── any

A probe is a pull of no blocks: it takes the whole way of a pull, and costs eight bytes.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from kv_transfer.handoff import PeerId
from kv_transfer.transport import PullFinal, PullOrder, PullOutcome, PullStatus, TransportEvent

_FAILURES = (PullStatus.TIMED_OUT, PullStatus.PEER_LOST, PullStatus.TRANSPORT_ERROR, PullStatus.DIGEST_MISMATCH)
_MAX_UNFINISHED = 2  # probes of one path that may still be under way; a released transfer is not over


class PathState(enum.Enum):
    UNPROVEN = "unproven"
    OK = "ok"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class PathStatus:
    source: PeerId
    state: PathState
    probe_ms: float
    failures: int
    detail: str


@dataclass(slots=True)
class _Path:
    source: PeerId
    next_probe: float
    attached: bool = True
    state: PathState = PathState.UNPROVEN
    failures: int = 0
    successes: int = 0
    probe_ms: float = 0.0
    detail: str = ""
    unfinished: set[int] = field(default_factory=set)


class PathMonitor:
    """Sans IO. `numbers` is shared with the reader: pull ids are unique in a transport."""

    def __init__(
        self,
        submit: Callable[[PullOrder], None],
        numbers: itertools.count[int],
        *,
        probe_every_s: float = 1.0,
        probe_timeout_s: float = 1.0,
        break_after: int = 2,
        heal_after: int = 2,
    ) -> None:
        self._submit = submit
        self._numbers = numbers
        self._probe_every_s = probe_every_s
        self._probe_timeout_s = probe_timeout_s
        self._break_after = break_after
        self._heal_after = heal_after
        self._paths: dict[PeerId, _Path] = {}
        self._probes: dict[int, _Path] = {}

    def attached(self, source: PeerId, now: float) -> None:
        path = self._paths.get(source)
        if path is None:
            self._paths[source] = _Path(source, now)
            return
        path.attached, path.next_probe = True, now
        path.state, path.failures, path.successes = PathState.UNPROVEN, 0, 0

    def lost(self, source: PeerId, reason: str, now: float) -> None:
        path = self._paths.get(source)
        if path is not None and path.attached:
            path.attached = False
            path.state, path.failures, path.detail = PathState.BROKEN, path.failures + 1, reason

    def gone(self, source: PeerId) -> None:
        """Not a peer any more."""
        path = self._paths.pop(source, None)
        if path is not None:
            for pull_id in path.unfinished:
                del self._probes[pull_id]

    def observe(self, source: PeerId, outcome: PullOutcome, now: float) -> None:
        """The outcome of a pull or probe."""
        path = self._paths.get(source)
        if path is None or not path.attached:
            return
        if outcome.status is PullStatus.ARRIVED:
            path.failures, path.detail = 0, ""
            path.successes += 1
            path.next_probe = now + self._probe_every_s
            if path.state is PathState.UNPROVEN or path.successes >= self._heal_after:
                path.state = PathState.OK
        elif outcome.status in _FAILURES:
            path.successes = 0
            path.failures += 1
            path.detail = f"{outcome.status.value}: {outcome.detail}" if outcome.detail else outcome.status.value
            path.next_probe = min(path.next_probe, now + self._probe_every_s / 4)
            if path.failures >= self._break_after:
                path.state = PathState.BROKEN

    def on_transport(self, event: TransportEvent, now: float) -> bool:
        """True: it was about a probe."""
        path = self._probes.get(event.pull_id)
        if path is None:
            return False
        if isinstance(event, PullFinal) or event.final:
            del self._probes[event.pull_id]
            path.unfinished.discard(event.pull_id)
        if isinstance(event, PullOutcome):
            path.probe_ms = event.duration_s * 1e3
            self.observe(path.source, event, now)
        return True

    def tick(self, now: float) -> None:
        for path in self._paths.values():
            if not path.attached or path.next_probe > now:
                continue
            path.next_probe = now + self._probe_every_s
            if len(path.unfinished) >= _MAX_UNFINISHED:
                continue
            pull_id = next(self._numbers)
            path.unfinished.add(pull_id)
            self._probes[pull_id] = path
            self._submit(PullOrder(pull_id, path.source, (), (), (), (), self._probe_timeout_s))

    def next_deadline(self) -> float | None:
        return min((p.next_probe for p in self._paths.values() if p.attached), default=None)

    def paths(self) -> tuple[PathStatus, ...]:
        return tuple(PathStatus(p.source, p.state, p.probe_ms, p.failures, p.detail) for p in self._paths.values())
