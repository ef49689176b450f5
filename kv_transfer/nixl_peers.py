"""The peers that our NIXL agent knows, and the ways to them.

    connect ──> known ── UCX gives the endpoint up ──> stale ── a word from the peer, nothing under way ──> rebuilt
                  └── disconnect: pulls end; what is under way is followed on ── gone: it will not come back

An endpoint that UCX has given up after a cut never works again. It is replaced once nothing is under way over it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerId
from kv_transfer.nixl_agent import NixlAgent, agent_name
from kv_transfer.nixl_endpoint import NixlEndpoint, host_identity
from kv_transfer.nixl_parts import PartLists
from kv_transfer.transport import AreaIndex, KvArea, Parts, Slices, misfit, not_agreed

log = logging.getLogger(__name__)

_REBUILD_AFTER_S = (1.0, 5.0, 15.0, 30.0)  # between tries; adding an unreachable peer blocks for about 3 s
_SILENT_S = 10.0
_MAX_LISTS = 8  # ways of cutting blocks of one peer: what we read from it, and what it asks us to write


@dataclass(slots=True)
class Peer:
    endpoint: NixlEndpoint
    agent_name: str
    mode: str
    index: AreaIndex
    blocks: Any  # prepared descriptor lists
    generations: Any
    scratch: Any
    parts: Parts | None = None  # what our pulls move of a block; None: whole blocks
    lists: dict[tuple[bool, Slices], PartLists] = field(default_factory=dict)  # by: do we read; what of a block
    connected: bool = True
    stale: bool = False  # UCX has given the endpoint up, or seems to have
    rebuilds: int = 0  # since it last worked
    rebuild_at: float = 0.0
    gone_at: float | None = None
    silent_since: float = 0.0  # requests without any answer; 0: answered

    @property
    def whole(self) -> bool:
        """What our pulls move, they move block by block."""
        return self.parts is None or all(part.is_whole or not part.slices for part in self.parts)

    def why_not(self, areas: Iterable[int]) -> str:
        """Blocks of these areas do not come from here; empty: they do."""
        return not_agreed(self.parts, areas)

    def was_read(self) -> None:
        """A read was done."""
        self.rebuilds = 0

    def answered(self) -> None:
        """Our request came through, and its answer did."""
        self.stale, self.rebuilds, self.silent_since = False, 0, 0.0

    def waited_in_vain(self, now: float) -> None:
        """No error, no answer. Replacing an endpoint also cuts the other direction off: not for one late answer."""
        self.silent_since = self.silent_since or now
        if now - self.silent_since > _SILENT_S:
            self.stale, self.silent_since = True, 0.0


class Peers:
    """None is ever removed: a transfer with it may be under way."""

    def __init__(self, agent: NixlAgent, config: TransportConfig) -> None:
        self._agent, self._config = agent, config
        self._known: dict[PeerId, Peer] = {}

    def get(self, peer: PeerId) -> Peer | None:
        return self._known.get(peer)

    def __getitem__(self, peer: PeerId) -> Peer:
        return self._known[peer]

    def named(self, name: str) -> PeerId | None:
        """Whose agent that is."""
        return next((peer for peer, known in self._known.items() if known.agent_name == name), None)

    def connect(self, peer: PeerId, endpoint_bytes: bytes, parts: Parts | None) -> bool:
        """A new one. False: it cannot be reached, and the log says why."""
        try:
            self._known[peer] = self._add(peer, NixlEndpoint.unpack(endpoint_bytes), parts)
        except Exception as error:
            log.warning("transport: cannot connect to %s: %s", peer.worker_id, error)
            return False
        log.info("transport: connected to %s, pull mode %s", peer.worker_id, self._known[peer].mode)
        return True

    def connect_again(self, peer: PeerId) -> None:
        """One that was known before; a dead endpoint may be replaced at once."""
        known = self._known[peer]
        known.connected, known.gone_at = True, None
        known.rebuilds, known.rebuild_at = 0, 0.0

    def disconnect(self, peer: PeerId) -> None:
        known = self._known.get(peer)
        if known is not None:
            known.connected = False

    def gone(self, peer: PeerId) -> None:
        known = self._known.get(peer)
        if known is not None:
            known.gone_at = time.monotonic()

    def suspect(self, peer: PeerId) -> None:
        known = self._known.get(peer)
        if known is not None:
            known.stale = True

    def revive(self, peer: PeerId, under_way: Callable[[PeerId], bool]) -> None:
        """Replace an endpoint that UCX has given up, once nothing is under way over it; ever less often in vain."""
        known = self._known.get(peer)
        now = time.monotonic()
        if known is None or not known.stale or now < known.rebuild_at or under_way(peer):
            return
        known.rebuild_at = now + _REBUILD_AFTER_S[min(known.rebuilds, len(_REBUILD_AFTER_S) - 1)]
        known.rebuilds += 1
        of_parts = [prepared for lists in known.lists.values() for prepared in (lists.own, lists.their)]
        for prepared in (known.blocks, known.generations, known.scratch, *of_parts):
            if prepared is not None:
                self._release(prepared)
        known.blocks = known.generations = known.scratch = None
        known.lists.clear()
        with contextlib.suppress(Exception):
            self._agent.nixl.remove_remote_agent(known.agent_name)
        try:
            fresh = self._add(peer, known.endpoint, known.parts)
        except Exception as error:
            log.warning("transport: cannot reconnect to %s: %s", peer.worker_id, error)
            return
        known.blocks, known.generations, known.scratch = fresh.blocks, fresh.generations, fresh.scratch
        known.stale = False
        log.info("transport: reconnected to %s", peer.worker_id)

    def close(self) -> None:
        for known in self._known.values():
            with contextlib.suppress(Exception):
                self._agent.nixl.remove_remote_agent(known.agent_name)

    def read(self, peer: Peer, own_ids: Sequence[int], their_ids: Sequence[int]) -> Any:
        """Begin to read what is agreed of these blocks."""
        if peer.parts is None or peer.whole:
            return self._agent.post("READ", self._agent.blocks, own_ids, peer.blocks, their_ids)
        slices = tuple(part.slices for part in peer.parts)
        lists = self._lists(peer, slices, reads=True)
        return lists.post(self._agent, "READ", own_ids, their_ids)

    def write(self, peer: Peer, own_ids: Sequence[int], their_ids: Sequence[int], slices: Slices | None) -> Any:
        """Begin to write what a reader asked for into its blocks. Its slices were checked."""
        if slices is None:
            return self._agent.post("WRITE", self._agent.blocks, own_ids, peer.blocks, their_ids)
        return self._lists(peer, slices, reads=False).post(self._agent, "WRITE", own_ids, their_ids)

    def _lists(self, peer: Peer, slices: Slices, *, reads: bool) -> PartLists:
        lists = peer.lists.get((reads, slices))
        if lists is None:
            if len(peer.lists) >= _MAX_LISTS:
                raise ValueError(f"{peer.agent_name} asks for parts in more than {_MAX_LISTS} ways")
            at_reader = [[(s.reader_offset, s.num_bytes) for s in of_area] for of_area in slices]
            at_source = [[(s.source_offset, s.num_bytes) for s in of_area] for of_area in slices]
            own, their = (at_reader, at_source) if reads else (at_source, at_reader)
            e = peer.endpoint
            where = (peer.agent_name, *_memory_of(e))
            lists = peer.lists[reads, slices] = PartLists(self._agent, where, e.areas, peer.index, own, their)
        return lists

    def _add(self, peer: PeerId, endpoint: NixlEndpoint, parts: Parts | None) -> Peer:
        """Raises what is wrong with the endpoint, or with the way to it."""
        agent, e = self._agent, endpoint
        theirs, ours = ([area.block_bytes for area in areas] for areas in (e.areas, agent.memory.areas))
        if why := misfit(ours, theirs, parts):
            raise ValueError(why)
        name = agent.nixl.add_remote_agent(e.metadata)
        name = name.decode() if isinstance(name, bytes) else name
        if name != agent_name(peer):
            raise ValueError(f"the metadata is of {name}")
        kind, device = _memory_of(e)
        index = AreaIndex(e.areas)
        added = Peer(
            e,
            name,
            self._mode_for(e),
            index,
            agent.prepare(name, kind, e.areas, device),
            agent.prepare(name, "DRAM", (KvArea(e.generations_address, 8, index.num_blocks),), 0),
            agent.prepare(name, "DRAM", (KvArea(e.scratch_address, 8, e.scratch_slots),), 0),
            parts,
        )
        agent.nixl.make_connection(name)
        return added

    def _release(self, prepared: Any) -> None:
        try:
            self._agent.nixl.release_dlist_handle(prepared)
        except Exception:
            log.exception("transport: a call failed")

    def _mode_for(self, endpoint: NixlEndpoint) -> str:
        if self._config.pull_mode != "auto":
            return self._config.pull_mode
        same_host = endpoint.host == host_identity() and self._config.ucx_tls != "tcp"
        # Over TCP a read is emulated and several times slower than a write; RDMA and NVLink have both.
        return "read" if same_host or endpoint.device >= 0 else "write"


def _memory_of(endpoint: NixlEndpoint) -> tuple[str, int]:
    return ("DRAM", 0) if endpoint.device < 0 else ("VRAM", endpoint.device)
