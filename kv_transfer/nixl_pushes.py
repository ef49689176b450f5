"""Write mode, at the source: what a reader asked for is written into its blocks.

    request ──> the data WRITTEN into exactly the blocks named ── done ──> our generations WRITTEN into the reader's
    scratch, with the notification that it is done

What failed is refused: the reader is told that nothing more will land.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_transfer.handoff import PeerId
from kv_transfer.nixl_agent import LANE_SLOTS, NixlAgent
from kv_transfer.nixl_messages import DONE, FAILED, Asked, pack_answer, unpack_request
from kv_transfer.nixl_peers import Peer, Peers
from kv_transfer.transport import AreaParts, Slices, misfit, not_agreed, unlike

log = logging.getLogger(__name__)

_MAX_CLOSED = 4096


@dataclass(slots=True, eq=False)
class Push:
    """One request being served."""

    reader: PeerId
    pull_id: int
    first_slot: int
    local: np.ndarray
    handle: Any = None
    fencing: bool = False


class Pushes:
    def __init__(self, agent: NixlAgent, peers: Peers) -> None:
        self._agent, self._peers = agent, peers
        self.live: list[Push] = []
        self._closed: defaultdict[PeerId, OrderedDict[int, None]] = defaultdict(OrderedDict)  # that we said are over

    def writes_to(self, reader: PeerId) -> bool:
        return any(push.reader == reader for push in self.live)

    def tell_whether_over(self, reader: PeerId, pull_id: int) -> None:
        """Silence while we write."""
        if not any(push.reader == reader and push.pull_id == pull_id for push in self.live):
            self._close(reader, pull_id)

    def _close(self, reader: PeerId, pull_id: int) -> None:
        """Once we said that it is over we never begin: the request may still be on its way."""
        closed = self._closed[reader]
        closed[pull_id] = None
        while len(closed) > _MAX_CLOSED:
            closed.popitem(last=False)
        self._refuse(reader, pull_id)

    def _refuse(self, reader: PeerId, pull_id: int) -> None:
        try:
            self._agent.nixl.send_notif(self._peers[reader].agent_name, pack_answer(FAILED, pull_id))
        except Exception as error:  # the reader asks again
            self._peers.suspect(reader)
            log.info("transport: cannot answer %s: %s", reader.worker_id, error)

    def serve(self, reader: PeerId, message: bytes) -> None:
        """A reader asks: write these blocks of ours into those of its own."""
        asked = unpack_request(message)
        known = self._peers[reader]
        if asked.pull_id in self._closed[reader] or known.stale:
            self._close(reader, asked.pull_id)
            return
        push = Push(reader, asked.pull_id, asked.first_slot, np.asarray(asked.remote or (0,), dtype=np.int32))
        problem = self._problem(known, asked)
        if problem is not None:
            log.warning("transport: %s asks for what cannot be: %s", reader.worker_id, problem)
            self._refuse(reader, asked.pull_id)
            return
        self.live.append(push)
        if not asked.local:  # a probe, or a fence alone
            self._guarded(push, self._write_fence)
        else:
            self._guarded(push, lambda p: self._write(p, known, asked))

    def _write(self, push: Push, known: Peer, asked: Asked) -> None:
        push.handle = self._peers.write(known, asked.remote, asked.local, asked.slices)
        self._follow(push)

    def _problem(self, reader: Peer, asked: Asked) -> str | None:
        own, count = self._agent.memory.index, len(asked.remote)
        moved = len(asked.local)
        if count > LANE_SLOTS or (moved != count and (moved or asked.slices is None)):
            return f"{count + moved} ids for {count} blocks, the limit is {LANE_SLOTS}"
        if asked.first_slot + max(count, 1) > reader.endpoint.scratch_slots:
            return f"{count} generations from {asked.first_slot} on, into {reader.endpoint.scratch_slots}"
        if not asked.local:
            return None if own.holds(asked.remote) else "the id of a block is out of range"
        problem = unlike(own, asked.remote, reader.index, asked.local)
        if problem is not None or asked.slices is None:
            return problem
        return self._wrong_parts(reader, asked.slices, own.areas_of(asked.remote))

    def _wrong_parts(self, reader: Peer, slices: Slices, areas: Sequence[int]) -> str | None:
        """Within our blocks and within the reader's, which it has named itself."""
        own, their = ([a.block_bytes for a in of] for of in (self._agent.memory.areas, reader.endpoint.areas))
        if not len(slices) == len(own) == len(their):
            return f"parts of blocks of {len(slices)} areas, ours are {len(own)}"
        parts = tuple(map(AreaParts, their, own, slices))
        return misfit(their, own, parts) or not_agreed(parts, areas) or None

    def advance(self, push: Push) -> None:
        self._guarded(push, self._follow)

    def _follow(self, push: Push) -> None:
        ended = self._agent.ended(push.handle)
        if ended is None:
            return
        if ended == "ERR":
            raise RuntimeError("NIXL reports an error")
        if push.fencing:
            self.live.remove(push)
        else:
            self._write_fence(push)

    def _write_fence(self, push: Push) -> None:
        """What the generations are now, after the data was written."""
        push.fencing = True
        slots = range(push.first_slot, push.first_slot + len(push.local))
        scratch, done = self._peers[push.reader].scratch, pack_answer(DONE, push.pull_id)
        push.handle = self._agent.post("WRITE", self._agent.generations, push.local, scratch, slots, done)

    def _guarded(self, push: Push, step: Callable[[Push], None]) -> None:
        try:
            step(push)
        except Exception as error:
            log.warning("transport: writing to %s failed: %s", push.reader.worker_id, error)
            if push in self.live:
                self.live.remove(push)
            self._peers.suspect(push.reader)
            self._refuse(push.reader, push.pull_id)
