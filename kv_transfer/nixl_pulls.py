"""Pulls of ours over NIXL, from the order to its outcome and its finality.

    read    data READ ── done ──> generations READ into scratch ── done ──> compare ──> outcome
    write   request by notification ──> the source WRITEs the data into exactly the blocks named, then the
            generations into our scratch, with a notification ──> compare ──> outcome

A transfer that is given up goes on being polled: releasing it would not stop its bytes. It is final when NIXL says
done or error, or, for writes, when the source says so or a later incarnation of it appears. The reader asks for that
word until it has it: a link that was cut may have swallowed the first one.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerId
from kv_transfer.nixl_agent import LANE_SLOTS, LANES, NixlAgent
from kv_transfer.nixl_messages import ASK, FAILED, pack_answer, pack_parts, pack_request
from kv_transfer.nixl_peers import Peer, Peers
from kv_transfer.transport import PullFinal, PullOrder, PullOutcome, PullStatus, TransportEvent, unlike
from kv_transfer.transport_inprocess import block_digest

_ASK_EVERY_S = 1.0
# A source that is gone for good writes no more: its process is dead, or UCX's keepalive (3 s) has closed the connection
# that its writes came over.
_GONE_S = 30.0


class _Stage(enum.Enum):
    QUEUED = enum.auto()
    DATA = enum.auto()
    FENCE = enum.auto()
    REQUESTED = enum.auto()  # write mode: the source works


@dataclass(slots=True, eq=False)
class Pull:
    order: PullOrder
    started: float
    deadline: float
    not_before: float
    stage: _Stage = _Stage.QUEUED
    lane: int = -1
    handle: Any = None
    reported: bool = False
    ask_at: float = 0.0


class Pulls:
    """`live` holds those whose finality is open, in the order of submission."""

    def __init__(
        self, agent: NixlAgent, peers: Peers, config: TransportConfig, deliver: Callable[[TransportEvent], None]
    ) -> None:
        self._agent, self._peers, self._config, self._deliver = agent, peers, config, deliver
        self.live: dict[int, Pull] = {}
        self._lanes = list(range(LANES))
        self._pace_free_at = 0.0

    def submit(self, order: PullOrder) -> None:
        now = time.monotonic()
        not_before = now
        peer = self._peers.get(order.source)
        problem = None if peer is None else self._problem(order, peer)
        if peer is not None and problem is None and self._config.slow_bytes_per_s is not None and order.local_blocks:
            seconds = self._agent.memory.bytes_of(order.local_blocks) / self._config.slow_bytes_per_s
            not_before = self._pace_free_at = max(now, self._pace_free_at) + seconds
        pull = Pull(order, now, now + order.timeout_s, not_before)
        self.live[order.pull_id] = pull
        if problem is not None:
            self._report(pull, PullStatus.TRANSPORT_ERROR, problem, final=True)
        else:
            self.advance(pull, now)

    def _problem(self, order: PullOrder, peer: Peer) -> str | None:
        if len(order.remote_blocks) > LANE_SLOTS:
            return f"{len(order.remote_blocks)} blocks in one pull, the limit is {LANE_SLOTS}"
        if not order.local_blocks:
            return None if peer.index.holds(order.remote_blocks) else "the id of a block is out of range"
        own = self._agent.memory.index
        problem = unlike(own, order.local_blocks, peer.index, order.remote_blocks)
        return problem or peer.why_not(set(own.areas_of(order.local_blocks))) or None

    def abandon(self, pull_id: int) -> None:
        pull = self.live.get(pull_id)
        if pull is not None and not pull.reported:
            self._fail(pull, PullStatus.ABANDONED, "")

    def disconnected(self, source: PeerId) -> None:
        for pull in [p for p in self.live.values() if p.order.source == source]:
            self._fail(pull, PullStatus.PEER_LOST, "the peer was disconnected")

    def superseded(self, by: PeerId) -> None:
        """A later incarnation proves that the earlier one is gone: what it was writing has ended."""
        for pull in list(self.live.values()):
            older = pull.order.source
            if pull.reported and older.worker_id == by.worker_id and older.epoch < by.epoch:
                self._finalize(pull)

    def reads_from(self, source: PeerId) -> bool:
        return any(pull.handle is not None and pull.order.source == source for pull in self.live.values())

    def close(self) -> None:
        for pull in list(self.live.values()):
            self._report(pull, PullStatus.TRANSPORT_ERROR, "the transport was closed", final=False)

    # One step of one pull.

    def advance(self, pull: Pull, now: float) -> None:
        try:
            match pull.stage:
                case _Stage.QUEUED:
                    self._begin(pull, now)
                case _Stage.DATA | _Stage.FENCE:
                    self._follow_read(pull)
                case _Stage.REQUESTED:
                    self._ask(pull, now)  # a notification ends it
        except Exception as error:
            self._peers.suspect(pull.order.source)
            if pull.stage is _Stage.REQUESTED:  # asking failed: the source may be writing all the same
                self._report(pull, PullStatus.PEER_LOST, str(error), final=False)
                return
            # NIXL raises for a lost peer, both on posting and on checking: nothing of this transfer can land then.
            self._end(pull, PullStatus.PEER_LOST, str(error) or type(error).__name__)
            return
        if pull.order.pull_id in self.live and not pull.reported and now >= pull.deadline:
            source = self._peers.get(pull.order.source)
            if pull.stage is _Stage.REQUESTED and source is not None:
                source.waited_in_vain(now)
            self._fail(pull, PullStatus.TIMED_OUT, f"no end within {pull.order.timeout_s:g} s")

    def _begin(self, pull: Pull, now: float) -> None:
        order = pull.order
        peer = self._peers.get(order.source)
        if peer is None or not peer.connected:
            self._end(pull, PullStatus.PEER_LOST, f"{order.source.worker_id} is not connected")
            return
        if now < pull.not_before or not self._lanes:
            return
        if peer.stale:
            self._end(pull, PullStatus.PEER_LOST, f"the way to {order.source.worker_id} is being rebuilt")
            return
        pull.lane = self._lanes.pop()
        if peer.mode == "write":
            pull.stage = _Stage.REQUESTED
            self._agent.nixl.send_notif(peer.agent_name, _request(pull, peer))
        elif not order.local_blocks:
            self._read_fence(pull, peer, order.remote_blocks or (0,))
        else:
            pull.stage = _Stage.DATA
            pull.handle = self._peers.read(peer, order.local_blocks, order.remote_blocks)
            self._follow_read(pull)

    def _read_fence(self, pull: Pull, peer: Peer, remote_blocks: Sequence[int]) -> None:
        pull.stage = _Stage.FENCE
        first = pull.lane * LANE_SLOTS
        slots = range(first, first + len(remote_blocks))
        pull.handle = self._agent.post("READ", self._agent.lanes, slots, peer.generations, remote_blocks)
        self._follow_read(pull)

    def _follow_read(self, pull: Pull) -> None:
        ended = self._agent.ended(pull.handle)
        if ended is None:
            return
        pull.handle = None
        if ended == "ERR":
            self._end(pull, PullStatus.TRANSPORT_ERROR, "NIXL reports an error")
            return
        if pull.reported:
            self._finalize(pull)  # given up earlier; now nothing can land
            return
        peer = self._peers[pull.order.source]
        if pull.stage is _Stage.DATA and pull.order.generations:
            # The fence: generations are read only after all data has been.
            self._read_fence(pull, peer, pull.order.remote_blocks)
            return
        peer.was_read()
        self._verify(pull)

    def _ask(self, pull: Pull, now: float) -> None:
        """Nobody waits for this write any more; only its source knows when no byte of it can land."""
        if not pull.reported or now < pull.ask_at:
            return
        pull.ask_at = now + _ASK_EVERY_S
        source = self._peers.get(pull.order.source)
        if source is not None and source.gone_at is not None and now - source.gone_at > _GONE_S:
            self._finalize(pull)
        elif source is not None and source.connected and not source.stale:
            self._agent.nixl.send_notif(source.agent_name, pack_answer(ASK, pull.order.pull_id))

    def answered(self, source: PeerId, letter: bytes, pull_id: int) -> None:
        """The source says how the write ended that we asked it for."""
        pull = self.live.get(pull_id)
        if pull is None or pull.order.source != source or pull.stage is not _Stage.REQUESTED:
            return
        self._peers[source].answered()
        if letter == FAILED:
            self._end(pull, PullStatus.TRANSPORT_ERROR, "the source could not write")
        elif pull.reported:
            self._finalize(pull)
        else:
            self._verify(pull)

    def _verify(self, pull: Pull) -> None:
        order = pull.order
        first = pull.lane * LANE_SLOTS
        found = self._agent.scratch[first : first + len(order.generations)]
        wrong = np.flatnonzero(found != np.asarray(order.generations, dtype=np.uint64))
        if len(wrong):
            at = int(wrong[0])
            self._end(
                pull,
                PullStatus.FENCED,
                f"block {order.remote_blocks[at]} is at generation {int(found[at])}, not {order.generations[at]}",
            )
            return
        for block, digest in zip(order.local_blocks, order.digests, strict=bool(order.digests)):
            if block_digest(self._agent.memory, block) != digest:
                self._end(pull, PullStatus.DIGEST_MISMATCH, f"the bytes of block {block} are not what was announced")
                return
        self._end(pull, PullStatus.ARRIVED, "")

    # Outcome and finality.

    def _fail(self, pull: Pull, status: PullStatus, detail: str) -> None:
        """The outcome is known; finality may take longer."""
        self._report(pull, status, detail, final=pull.stage is _Stage.QUEUED)

    def _end(self, pull: Pull, status: PullStatus, detail: str) -> None:
        """Outcome and finality in one, or finality alone if the outcome was told before."""
        if pull.reported:
            self._finalize(pull)
        else:
            self._report(pull, status, detail, final=True)

    def _report(self, pull: Pull, status: PullStatus, detail: str, *, final: bool) -> None:
        if pull.reported:
            return
        pull.reported = True
        self._deliver(PullOutcome(pull.order.pull_id, status, final, detail, time.monotonic() - pull.started))
        if final:
            self._forget(pull)

    def _finalize(self, pull: Pull) -> None:
        self._forget(pull)
        self._deliver(PullFinal(pull.order.pull_id))

    def _forget(self, pull: Pull) -> None:
        del self.live[pull.order.pull_id]
        if pull.lane >= 0:
            self._lanes.append(pull.lane)


def _request(pull: Pull, peer: Peer) -> bytes:
    order, first_slot = pull.order, pull.lane * LANE_SLOTS
    fence_alone = len(order.local_blocks) != len(order.remote_blocks)
    if fence_alone or not peer.whole:
        parts = peer.parts if peer.parts is not None and not fence_alone else ()
        return pack_parts(order.pull_id, first_slot, order.remote_blocks, order.local_blocks, parts)
    return pack_request(order.pull_id, first_slot, order.remote_blocks, order.local_blocks)
