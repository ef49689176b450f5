"""A request while it lives in the router, and what its first placement turned out to be worth."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from router.access.gate import Pass
from router.effects import Client
from router.errors import Failure, RequestRefused, our_failure
from router.lifecycle import Life
from router.placement.cluster import Cluster
from router.placement.policy import WorkerKey
from router.record.history import itl_ms
from router.record.tracing import RequestTrace
from router.request import LegStart

log = logging.getLogger(__name__)


class Sender(Protocol):
    """The streams to the workers; each call buffers."""

    def start(self, worker: WorkerKey, start: LegStart, deadline_s: float) -> None: ...

    def cancel(self, worker: WorkerKey, leg: int, reason: str, keep_lease: bool) -> None: ...

    def continue_locally(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...]) -> None: ...

    def follow(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...], pull: tuple[str, WorkerKey]) -> None: ...

    def serve(self, worker: WorkerKey, leg: int, handoff_id: str, most_tokens: int) -> None: ...

    def freeze(self, worker: WorkerKey, leg: int, handoff_id: str) -> None: ...

    def keep(self, worker: WorkerKey, leg: int, handoff_id: str) -> None: ...

    def resync_blocks(self, worker: WorkerKey) -> None: ...


class Timer(Protocol):
    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]  # seconds from now


class BufferedClient(Client, Protocol):
    """A client whose buffer is sent on when the router has nothing more to add for now."""

    def wake(self) -> None: ...


@dataclass(slots=True, eq=False)
class Live:
    life: Life
    client: BufferedClient
    trace: RequestTrace
    way: Pass
    timer: Timer | None = None
    learned_ttft: bool = False
    learned_handoff: bool = False
    adopted_ms: float | None = None  # from the first token, as the router heard it
    waiting: list[Live] = field(default_factory=list)  # other answers to its prompt (router/forks.py)
    waited: bool = False  # for another answer's prompt

    def wait_for(self, first: Live) -> None:
        self.waited = True
        first.waiting.append(self)


def learn_early(live: Live, cluster: Cluster, now: float) -> None:
    """With the first token, and with the handover: the first placement's, as long as nothing went wrong.

    What is scored takes longer than a prompt of its length, and what has waited for its prompt is quicker: neither says
    anything about others.
    """
    life = live.life
    if life.request.needs_whole_prompt or live.waited:
        return
    estimates, times = life.route.estimates, life.times
    if life.moved or times.first_token is None or times.dispatched is None:
        return
    if not live.learned_ttft:
        live.learned_ttft = True
        actual_ms = (times.first_token - times.dispatched) * 1e3
        uncorrected_ms = estimates["uncorrected_ttft_ms"]
        cluster.learned_ttft(life.route.computing, uncorrected_ms, actual_ms, now, estimates["backlog_ms"])
    elif life.route.split and not live.learned_handoff:
        live.learned_handoff = True
        live.adopted_ms = (now - times.first_token) * 1e3
        predicted_ms = estimates["uncorrected_handoff_ms"]
        cluster.learned_handoff(life.route.decode, predicted_ms, live.adopted_ms, now)


def learn_itl(life: Life, cluster: Cluster, now: float) -> None:
    """With the complete answer."""
    actual_ms = itl_ms(life)
    if not life.moved and actual_ms is not None:
        cluster.learned_itl(life.route.decode, life.route.estimates["uncorrected_itl_ms"], actual_ms, now)


def log_end(live: Live) -> None:
    life, times = live.life, live.life.times
    log.debug(
        "ended: %s, %s on %s (%s), %d + %d tokens, first after %.1f ms, all after %.1f ms, recoveries %d",
        life.outcome,
        "split" if life.route.split else "local",
        life.route.decode.worker_id,
        life.route.rule,
        len(life.request.prompt),
        len(life.emitted),
        ((times.first_token or life.request.arrived) - life.request.arrived) * 1e3,
        ((times.ended or life.request.arrived) - life.request.arrived) * 1e3,
        life.recoveries,
        extra={"request_id": life.request.request_id, "trace_id": live.trace.trace_id},
    )


def failure_of(error: Exception) -> Failure:
    """Why a request did not begin: a refusal's own words, or that we failed, which every door says alike."""
    if isinstance(error, RequestRefused):
        return error.failure
    log.error("a request could not be admitted", exc_info=error)
    return our_failure(error)
