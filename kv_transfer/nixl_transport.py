"""KV over NIXL (UCX): RDMA, NVLink, shared memory or TCP, whatever UCX finds between two pools.

One agent per process, touched by one owner thread only: without that, several threads crash it. The thread polls; that
also makes the progress which a passive side owes its peers (NIXL's own progress thread spins on a core).

    read    data READ ── done ──> generations READ into scratch ── done ──> compare ──> outcome
    write   request by notification ──> the source WRITEs the data into exactly the blocks named, then the
            generations into the reader's scratch, with a notification ──> compare ──> outcome

A transfer that is given up goes on being polled: releasing it would not stop its bytes. It is final when NIXL says
done or error, or, for writes, when the source says so or a later incarnation of it appears. The reader asks for that
word until it has it: a link that was cut may have swallowed the first one.

An endpoint that UCX has given up after a cut never works again. It is replaced once nothing is under way over it.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import queue
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerId
from kv_transfer.nixl_endpoint import NixlEndpoint, host_identity
from kv_transfer.transport import (
    KvMemory,
    PullFinal,
    PullOrder,
    PullOutcome,
    PullStatus,
    TransportEvent,
)
from kv_transfer.transport_inprocess import block_digest
from settings.listeners import declare, listening

log = logging.getLogger(__name__)

_LANES = 64  # pulls at once that have a place for their generations
LANE_SLOTS = 256  # blocks in one pull, at most
_BUSY_POLL_S = 50e-6
_IDLE_POLL_S = 1e-3
_REST_POLL_S = 5e-3  # after a while without any transfer
_REST_AFTER_S = 2.0

# Notifications of write mode: one letter, then fixed fields.
_REQUEST = struct.Struct("<cQII")  # b"R", pull id, first scratch slot, blocks; then remote ids, local ids (u32)
_ANSWER = struct.Struct("<cQ")  # b"D" done or b"F" failed, pull id; b"Q" from the reader: is it over?
_ASK_EVERY_S = 1.0
_REBUILD_AFTER_S = (1.0, 5.0, 15.0, 30.0)  # between tries; adding an unreachable peer blocks for about 3 s
_SILENT_S = 10.0
_MAX_CLOSED = 4096
# A source that is gone for good writes no more: its process is dead, or UCX's keepalive (3 s) has closed the connection
# that its writes came over.
_GONE_S = 30.0


class NixlUnavailable(ImportError):
    """NIXL is not installed; the message says how to install it."""


def _load_nixl() -> Any:
    for module in ("nixl_cu12._api", "nixl_cu13._api", "nixl._api"):
        with contextlib.suppress(ImportError):
            return __import__(module, fromlist=["nixl_agent"])
    raise NixlUnavailable(
        "NIXL is not installed; run `make setup`, or `pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1`"
    )


class _Stage(enum.Enum):
    QUEUED = enum.auto()
    DATA = enum.auto()
    FENCE = enum.auto()
    REQUESTED = enum.auto()  # write mode: the source works


@dataclass(slots=True, eq=False)
class _Pull:
    order: PullOrder
    started: float
    deadline: float
    not_before: float
    stage: _Stage = _Stage.QUEUED
    lane: int = -1
    handle: Any = None
    reported: bool = False
    ask_at: float = 0.0


@dataclass(slots=True, eq=False)
class _Push:
    """Write mode, at the source: one request being served."""

    peer: PeerId
    pull_id: int
    first_slot: int
    local: np.ndarray
    handle: Any = None
    fencing: bool = False


@dataclass(slots=True)
class _Peer:
    endpoint: NixlEndpoint
    agent_name: str
    mode: str
    blocks: Any  # prepared descriptor lists
    generations: Any
    scratch: Any
    connected: bool = True
    stale: bool = False  # UCX has given the endpoint up, or seems to have
    rebuilds: int = 0  # since it last worked
    rebuild_at: float = 0.0
    gone_at: float | None = None
    silent_since: float = 0.0  # requests without any answer; 0: answered
    closed: OrderedDict[int, None] = field(default_factory=OrderedDict)  # pulls that we said are over


@dataclass(slots=True)
class _State:
    """What only the owner thread touches."""

    peers: dict[PeerId, _Peer] = field(default_factory=dict)
    pulls: dict[int, _Pull] = field(default_factory=dict)
    pushes: list[_Push] = field(default_factory=list)
    lanes: list[int] = field(default_factory=lambda: list(range(_LANES)))
    pace_free_at: float = 0.0
    last_activity: float = 0.0


class NixlTransport:
    """`deliver` is called on the owner thread and must not block."""

    name = "nixl"

    def __init__(self, peer: PeerId, config: TransportConfig, deliver: Callable[[TransportEvent], None]) -> None:
        self.peer = peer
        self._config = config
        self._deliver = deliver
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._state = _State()
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="nixl", daemon=True)
        # For the watchdog, which reads them from another thread: when the owner thread last came back from a call
        # (connecting to a host that does not answer takes about 3 s), and the oldest pull without an outcome.
        self.last_turn = time.monotonic()
        self.oldest_pull_since: float | None = None

    # KvTransport.

    def describe(self) -> str:
        memory = "vram" if self._memory.device != "cpu" else "dram"
        lanes = self._config.ucx_tls or "all"
        return f"nixl/UCX {memory}, pull={self._config.pull_mode}, lanes={lanes}"

    def register(self, memory: KvMemory) -> None:
        self._memory = memory
        self._scratch = np.zeros(_LANES * LANE_SLOTS, dtype=np.uint64)
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed

    def endpoint(self) -> bytes:
        return self._endpoint.pack()

    def connect(self, peer: PeerId, endpoint: bytes) -> None:
        self._commands.put(lambda: self._connect(peer, endpoint))

    def disconnect(self, peer: PeerId) -> None:
        self._commands.put(lambda: self._disconnect(peer))

    def reachable(self, peer: PeerId) -> None:
        """A word came from there this moment. Only then is a dead endpoint replaced: reaching for a peer that does
        not answer would block the thread that serves all others.
        """
        self._commands.put(lambda: self._reachable(peer))

    def forget(self, peer: PeerId) -> None:
        """It will not come back. Its writes into our blocks are over a while after that."""
        self._commands.put(lambda: self._gone(peer))

    def submit(self, order: PullOrder) -> None:
        self._commands.put(lambda: self._submit(order))

    def abandon(self, pull_id: int) -> None:
        self._commands.put(lambda: self._abandon(pull_id))

    def close(self, timeout_s: float) -> None:
        if self._thread.is_alive():
            self._commands.put(None)
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # The owner thread.

    def _run(self) -> None:
        try:
            self._open()
        except BaseException as error:
            self._failed = error
            self._ready.set()
            return
        self._ready.set()
        while self._turn():
            pass
        self._shut()

    def _open(self) -> None:
        if self._config.ucx_tls:
            os.environ["UCX_TLS"] = self._config.ucx_tls
        if self._config.ucx_net_devices:
            os.environ["UCX_NET_DEVICES"] = self._config.ucx_net_devices
        os.environ.setdefault("UCX_TCP_CONN_NB", "y")  # connecting to a host that does not answer blocks nobody
        os.environ.setdefault("UCX_TCP_SYN_CNT", "2")
        # A cut link ends a read in seconds rather than never. The keepalive interval itself must stay as it is.
        os.environ.setdefault("UCX_TCP_KEEPIDLE", "1s")
        os.environ.setdefault("UCX_TCP_KEEPINTVL", "1s")
        os.environ.setdefault("UCX_TCP_KEEPCNT", "2")
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        api = _load_nixl()
        memory = self._memory
        self._agent_name = _agent_name(self.peer)
        before = set(listening(os.getpid()))
        self._agent = api.nixl_agent(self._agent_name, api.nixl_agent_config(enable_prog_thread=False))
        for _, port in set(listening(os.getpid())) - before:
            declare(port, "UCX (KV)", "none", encrypted=False)
        self._kind = "DRAM" if memory.device == "cpu" else "VRAM"
        self._device = 0 if memory.device == "cpu" else int(memory.device.split(":")[1])
        pool_bytes = memory.block_bytes * memory.num_blocks
        self._registered = [
            self._agent.register_memory([(memory.base_address, pool_bytes, self._device, "")], self._kind),
            self._agent.register_memory([(_address(memory.generations), memory.generations.nbytes, 0, "")], "DRAM"),
            self._agent.register_memory([(_address(self._scratch), self._scratch.nbytes, 0, "")], "DRAM"),
        ]
        self._own_blocks = self._prepare(
            "", self._kind, memory.base_address, memory.block_bytes, memory.num_blocks, self._device
        )
        self._own_generations = self._prepare("", "DRAM", _address(memory.generations), 8, memory.num_blocks, 0)
        self._own_scratch = self._prepare("", "DRAM", _address(self._scratch), 8, len(self._scratch), 0)
        self._endpoint = NixlEndpoint(
            host=host_identity(),
            base_address=memory.base_address,
            block_bytes=memory.block_bytes,
            num_blocks=memory.num_blocks,
            generations_address=_address(memory.generations),
            scratch_address=_address(self._scratch),
            scratch_slots=len(self._scratch),
            device=-1 if memory.device == "cpu" else self._device,
            metadata=self._agent.get_agent_metadata(),
        )

    def _prepare(self, agent: str, kind: str, base: int, size: int, count: int, device: int) -> Any:
        """A descriptor per block, once per pool and peer; transfers then name indices only."""
        rows = np.empty((count, 3), dtype=np.uint64)
        rows[:, 0] = base + np.arange(count, dtype=np.uint64) * np.uint64(size)
        rows[:, 1] = size
        rows[:, 2] = device
        return self._agent.prep_xfer_dlist(agent, rows, kind)

    def _turn(self) -> bool:
        """One round; False when asked to close."""
        state = self._state
        self.last_turn = now = time.monotonic()
        if state.pulls or state.pushes:
            state.last_activity = now
            wait_s = _BUSY_POLL_S
        else:
            wait_s = _IDLE_POLL_S if now - state.last_activity < _REST_AFTER_S else _REST_POLL_S
        try:
            command = self._commands.get(timeout=wait_s)
            while True:
                if command is None:
                    return False
                self._guard(command)
                command = self._commands.get_nowait()
        except queue.Empty:
            pass
        now = time.monotonic()
        self._guard(self._take_notifications)
        for push in list(state.pushes):
            self._guard(lambda p=push: self._advance_push(p))
        oldest: float | None = None
        for pull in list(state.pulls.values()):  # in the order of submission
            self._advance_pull(pull, now)
            if oldest is None and not pull.reported:
                oldest = pull.started
            self.last_turn = time.monotonic()
        self.oldest_pull_since = oldest
        return True

    def _guard(self, call: Callable[[], None]) -> None:
        """What goes wrong with one peer must not end the thread that serves all."""
        try:
            call()
        except Exception:
            log.exception("transport: a call failed")
        self.last_turn = time.monotonic()

    def _shut(self) -> None:
        for pull in list(self._state.pulls.values()):
            self._report(pull, PullStatus.TRANSPORT_ERROR, "the transport was closed", final=False)
        for peer in list(self._state.peers):
            with contextlib.suppress(Exception):
                self._agent.remove_remote_agent(_agent_name(peer))
        # Registered memory stays registered: a peer's transfer into it may still be under way.

    # Peers.

    def _connect(self, peer: PeerId, endpoint_bytes: bytes) -> None:
        state = self._state
        known = state.peers.get(peer)
        if known is not None:
            known.connected, known.gone_at = True, None
            known.rebuilds, known.rebuild_at = 0, 0.0
            self._revive(peer, known)
            return
        try:
            state.peers[peer] = self._add(peer, NixlEndpoint.unpack(endpoint_bytes))
        except Exception as error:
            log.warning("transport: cannot connect to %s: %s", peer.worker_id, error)
            return
        log.info("transport: connected to %s, pull mode %s", peer.worker_id, state.peers[peer].mode)
        # A later incarnation proves that the earlier one is gone: what it was writing has ended.
        for pull in list(state.pulls.values()):
            older = pull.order.source
            if pull.reported and older.worker_id == peer.worker_id and older.epoch < peer.epoch:
                self._finalize(pull)

    def _add(self, peer: PeerId, endpoint: NixlEndpoint) -> _Peer:
        """Raises what is wrong with the endpoint, or with the way to it."""
        if endpoint.block_bytes != self._memory.block_bytes:
            raise ValueError(f"blocks of {endpoint.block_bytes} bytes, ours have {self._memory.block_bytes}")
        name = self._agent.add_remote_agent(endpoint.metadata)
        name = name.decode() if isinstance(name, bytes) else name
        if name != _agent_name(peer):
            raise ValueError(f"the metadata is of {name}")
        kind, device = ("DRAM", 0) if endpoint.device < 0 else ("VRAM", endpoint.device)
        e = endpoint
        added = _Peer(
            endpoint,
            name,
            self._mode_for(endpoint),
            self._prepare(name, kind, e.base_address, e.block_bytes, e.num_blocks, device),
            self._prepare(name, "DRAM", e.generations_address, 8, e.num_blocks, 0),
            self._prepare(name, "DRAM", e.scratch_address, 8, e.scratch_slots, 0),
        )
        self._agent.make_connection(name)
        return added

    def _revive(self, peer: PeerId, known: _Peer) -> None:
        """Replace an endpoint that UCX has given up, once nothing is under way over it; ever less often in vain."""
        now = time.monotonic()
        if not known.stale or now < known.rebuild_at or self._under_way(peer):
            return
        known.rebuild_at = now + _REBUILD_AFTER_S[min(known.rebuilds, len(_REBUILD_AFTER_S) - 1)]
        known.rebuilds += 1
        for prepared in (known.blocks, known.generations, known.scratch):
            if prepared is not None:
                self._guard(lambda p=prepared: self._agent.release_dlist_handle(p))
        known.blocks = known.generations = known.scratch = None
        with contextlib.suppress(Exception):
            self._agent.remove_remote_agent(known.agent_name)
        try:
            fresh = self._add(peer, known.endpoint)
        except Exception as error:
            log.warning("transport: cannot reconnect to %s: %s", peer.worker_id, error)
            return
        known.blocks, known.generations, known.scratch = fresh.blocks, fresh.generations, fresh.scratch
        known.stale = False
        log.info("transport: reconnected to %s", peer.worker_id)

    def _under_way(self, peer: PeerId) -> bool:
        state = self._state
        return any(p.handle is not None and p.order.source == peer for p in state.pulls.values()) or any(
            push.peer == peer for push in state.pushes
        )

    def _suspect(self, peer: PeerId) -> None:
        known = self._state.peers.get(peer)
        if known is not None:
            known.stale = True

    def _mode_for(self, endpoint: NixlEndpoint) -> str:
        if self._config.pull_mode != "auto":
            return self._config.pull_mode
        same_host = endpoint.host == host_identity() and self._config.ucx_tls != "tcp"
        # Over TCP a read is emulated and several times slower than a write; RDMA and NVLink have both.
        return "read" if same_host or endpoint.device >= 0 else "write"

    def _disconnect(self, peer: PeerId) -> None:
        known = self._state.peers.get(peer)
        if known is not None:
            known.connected = False
        for pull in [p for p in self._state.pulls.values() if p.order.source == peer]:
            self._fail(pull, PullStatus.PEER_LOST, "the peer was disconnected")

    def _reachable(self, peer: PeerId) -> None:
        known = self._state.peers.get(peer)
        if known is not None:
            self._revive(peer, known)

    def _gone(self, peer: PeerId) -> None:
        self._disconnect(peer)
        known = self._state.peers.get(peer)
        if known is not None:
            known.gone_at = time.monotonic()

    # Pulls.

    def _submit(self, order: PullOrder) -> None:
        now = time.monotonic()
        not_before = now
        if self._config.slow_bytes_per_s is not None and order.local_blocks:
            seconds = len(order.local_blocks) * self._memory.block_bytes / self._config.slow_bytes_per_s
            not_before = self._state.pace_free_at = max(now, self._state.pace_free_at) + seconds
        pull = _Pull(order, now, now + order.timeout_s, not_before)
        self._state.pulls[order.pull_id] = pull
        problem = self._problem(order)
        if problem is not None:
            self._report(pull, PullStatus.TRANSPORT_ERROR, problem, final=True)
        else:
            self._advance_pull(pull, now)

    def _problem(self, order: PullOrder) -> str | None:
        if len(order.local_blocks) > LANE_SLOTS:
            return f"{len(order.local_blocks)} blocks in one pull, the limit is {LANE_SLOTS}"
        peer = self._state.peers.get(order.source)
        if peer is not None and max(order.remote_blocks, default=0) >= peer.endpoint.num_blocks:
            return "a source block id is out of range"
        return None

    def _abandon(self, pull_id: int) -> None:
        pull = self._state.pulls.get(pull_id)
        if pull is not None and not pull.reported:
            self._fail(pull, PullStatus.ABANDONED, "")

    def _fail(self, pull: _Pull, status: PullStatus, detail: str) -> None:
        """The outcome is known; finality may take longer."""
        self._report(pull, status, detail, final=pull.stage is _Stage.QUEUED)

    def _advance_pull(self, pull: _Pull, now: float) -> None:
        try:
            match pull.stage:
                case _Stage.QUEUED:
                    self._begin(pull, now)
                case _Stage.DATA | _Stage.FENCE:
                    self._follow_read(pull)
                case _Stage.REQUESTED:
                    self._ask(pull, now)  # a notification ends it
        except Exception as error:
            self._suspect(pull.order.source)
            if pull.stage is _Stage.REQUESTED:  # asking failed: the source may be writing all the same
                self._report(pull, PullStatus.PEER_LOST, str(error), final=False)
                return
            # NIXL raises for a lost peer, both on posting and on checking: nothing of this transfer can land then.
            self._end(pull, PullStatus.PEER_LOST, str(error) or type(error).__name__)
            return
        if pull.order.pull_id in self._state.pulls and not pull.reported and now >= pull.deadline:
            if pull.stage is _Stage.REQUESTED:
                self._waited_in_vain(pull.order.source, now)
            self._fail(pull, PullStatus.TIMED_OUT, f"no end within {pull.order.timeout_s:g} s")

    def _waited_in_vain(self, source: PeerId, now: float) -> None:
        """No error, no answer. Replacing an endpoint also cuts the other direction off: not for one late answer."""
        known = self._state.peers.get(source)
        if known is None:
            return
        known.silent_since = known.silent_since or now
        if now - known.silent_since > _SILENT_S:
            known.stale, known.silent_since = True, 0.0

    def _ask(self, pull: _Pull, now: float) -> None:
        """Nobody waits for this write any more; only its source knows when no byte of it can land."""
        if not pull.reported or now < pull.ask_at:
            return
        pull.ask_at = now + _ASK_EVERY_S
        source = pull.order.source
        known = self._state.peers.get(source)
        if known is not None and known.gone_at is not None and now - known.gone_at > _GONE_S:
            self._finalize(pull)
        elif known is not None and known.connected and not known.stale:
            self._agent.send_notif(known.agent_name, _ANSWER.pack(b"Q", pull.order.pull_id))

    def _begin(self, pull: _Pull, now: float) -> None:
        peer = self._state.peers.get(pull.order.source)
        if peer is None or not peer.connected:
            self._end(pull, PullStatus.PEER_LOST, f"{pull.order.source.worker_id} is not connected")
            return
        if now < pull.not_before or not self._state.lanes:
            return
        if peer.stale:
            self._end(pull, PullStatus.PEER_LOST, f"the way to {pull.order.source.worker_id} is being rebuilt")
            return
        pull.lane = self._state.lanes.pop()
        order = pull.order
        if peer.mode == "write":
            pull.stage = _Stage.REQUESTED
            ids = np.asarray((order.remote_blocks, order.local_blocks), dtype="<u4").tobytes()  # none in a probe
            head = _REQUEST.pack(b"R", order.pull_id, pull.lane * LANE_SLOTS, len(order.local_blocks))
            self._agent.send_notif(peer.agent_name, head + ids)
            return
        if not order.local_blocks:
            self._read_fence(pull, peer, (0,))
            return
        pull.stage = _Stage.DATA
        self._post(pull, "READ", self._own_blocks, order.local_blocks, peer.blocks, order.remote_blocks)
        self._follow_read(pull)

    def _read_fence(self, pull: _Pull, peer: _Peer, remote_blocks: Sequence[int]) -> None:
        pull.stage = _Stage.FENCE
        first = pull.lane * LANE_SLOTS
        slots = range(first, first + len(remote_blocks))
        self._post(pull, "READ", self._own_scratch, slots, peer.generations, remote_blocks)
        self._follow_read(pull)

    def _post(self, pull: _Pull, operation: str, own: Any, own_ids: Any, their: Any, their_ids: Any) -> None:
        pull.handle = self._agent.make_prepped_xfer(
            operation, own, np.asarray(own_ids, dtype=np.int32), their, np.asarray(their_ids, dtype=np.int32)
        )
        self._agent.transfer(pull.handle)

    def _follow_read(self, pull: _Pull) -> None:
        state = self._agent.check_xfer_state(pull.handle)
        if state == "PROC":
            return
        self._agent.release_xfer_handle(pull.handle)
        pull.handle = None
        if state == "ERR":
            self._end(pull, PullStatus.TRANSPORT_ERROR, "NIXL reports an error")
            return
        if pull.reported:
            self._finalize(pull)  # given up earlier; now nothing can land
            return
        if pull.stage is _Stage.DATA:
            # The fence: generations are read only after all data has been.
            self._read_fence(pull, self._state.peers[pull.order.source], pull.order.remote_blocks)
            return
        self._state.peers[pull.order.source].rebuilds = 0
        self._verify(pull)

    def _verify(self, pull: _Pull) -> None:
        order = pull.order
        first = pull.lane * LANE_SLOTS
        found = self._scratch[first : first + len(order.local_blocks)]
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
            if block_digest(self._memory, block) != digest:
                self._end(pull, PullStatus.DIGEST_MISMATCH, f"the bytes of block {block} are not what was announced")
                return
        self._end(pull, PullStatus.ARRIVED, "")

    def _end(self, pull: _Pull, status: PullStatus, detail: str) -> None:
        """Outcome and finality in one, or finality alone if the outcome was told before."""
        if pull.reported:
            self._finalize(pull)
        else:
            self._report(pull, status, detail, final=True)

    def _report(self, pull: _Pull, status: PullStatus, detail: str, *, final: bool) -> None:
        if pull.reported:
            return
        pull.reported = True
        self._deliver(PullOutcome(pull.order.pull_id, status, final, detail, time.monotonic() - pull.started))
        if final:
            self._forget(pull)

    def _finalize(self, pull: _Pull) -> None:
        self._forget(pull)
        self._deliver(PullFinal(pull.order.pull_id))

    def _forget(self, pull: _Pull) -> None:
        del self._state.pulls[pull.order.pull_id]
        if pull.lane >= 0:
            self._state.lanes.append(pull.lane)

    # Write mode.

    def _take_notifications(self) -> None:
        for name, messages in self._agent.get_new_notifs().items():
            sender = name.decode() if isinstance(name, bytes) else name
            for message in messages:
                self._guard(lambda s=sender, m=message: self._notified(s, m))

    def _notified(self, sender: str, message: bytes) -> None:
        peer = next((p for p, known in self._state.peers.items() if known.agent_name == sender), None)
        if peer is None:
            log.warning("transport: a notification from %s, who is not connected", sender)
        elif message[:1] == b"R":
            self._serve(peer, message)
        elif message[:1] == b"Q" and len(message) == _ANSWER.size:
            self._tell_whether_over(peer, _ANSWER.unpack(message)[1])
        elif message[:1] in (b"D", b"F") and len(message) == _ANSWER.size:
            letter, pull_id = _ANSWER.unpack(message)
            pull = self._state.pulls.get(pull_id)
            if pull is None or pull.order.source != peer or pull.stage is not _Stage.REQUESTED:
                return
            known = self._state.peers[peer]  # our request came through, and this answer did
            known.stale, known.rebuilds, known.silent_since = False, 0, 0.0
            if letter == b"F":
                self._end(pull, PullStatus.TRANSPORT_ERROR, "the source could not write")
            elif pull.reported:
                self._finalize(pull)
            else:
                self._verify(pull)

    def _tell_whether_over(self, peer: PeerId, pull_id: int) -> None:
        """Silence while we write."""
        if not any(push.peer == peer and push.pull_id == pull_id for push in self._state.pushes):
            self._close_pull(peer, self._state.peers[peer], pull_id)

    def _close_pull(self, peer: PeerId, known: _Peer, pull_id: int) -> None:
        """Once we said that it is over we never begin: the request may still be on its way."""
        known.closed[pull_id] = None
        while len(known.closed) > _MAX_CLOSED:
            known.closed.popitem(last=False)
        self._refuse(peer, known, pull_id)

    def _refuse(self, peer: PeerId, known: _Peer, pull_id: int) -> None:
        try:
            self._agent.send_notif(known.agent_name, _ANSWER.pack(b"F", pull_id))
        except Exception as error:  # the reader asks again
            self._suspect(peer)
            log.info("transport: cannot answer %s: %s", peer.worker_id, error)

    def _serve(self, peer: PeerId, message: bytes) -> None:
        """A reader asks: write these blocks of ours into those of its own."""
        _, pull_id, first_slot, count = _REQUEST.unpack_from(message)
        ids = np.frombuffer(message, dtype="<u4", offset=_REQUEST.size)
        known = self._state.peers[peer]
        if pull_id in known.closed or known.stale:
            self._close_pull(peer, known, pull_id)
            return
        push = _Push(peer, pull_id, first_slot, ids[:count].astype(np.int32))
        if count == 0 and first_slot < known.endpoint.scratch_slots:  # a probe: only the fence's way
            push.local = np.zeros(1, dtype=np.int32)
            self._state.pushes.append(push)
            self._guarded_push(push, self._write_fence)
            return
        if (
            len(ids) != 2 * count
            or not 0 < count <= LANE_SLOTS
            or first_slot + count > known.endpoint.scratch_slots
            or int(ids[:count].max()) >= self._memory.num_blocks
            or int(ids[count:].max()) >= known.endpoint.num_blocks
        ):
            log.warning("transport: %s asks for blocks that do not exist", peer.worker_id)
            self._refuse(peer, known, pull_id)
            return
        push.handle = self._agent.make_prepped_xfer(
            "WRITE", self._own_blocks, push.local, known.blocks, ids[count:].astype(np.int32)
        )
        self._agent.transfer(push.handle)
        self._state.pushes.append(push)
        self._advance_push(push)

    def _advance_push(self, push: _Push) -> None:
        self._guarded_push(push, self._follow_push)

    def _follow_push(self, push: _Push) -> None:
        state = self._agent.check_xfer_state(push.handle)
        if state == "PROC":
            return
        self._agent.release_xfer_handle(push.handle)
        if state == "ERR":
            raise RuntimeError("NIXL reports an error")
        if push.fencing:
            self._state.pushes.remove(push)
        else:
            self._write_fence(push)

    def _write_fence(self, push: _Push) -> None:
        """What the generations are now, after the data was written."""
        push.fencing = True
        slots = np.arange(push.first_slot, push.first_slot + len(push.local), dtype=np.int32)
        push.handle = self._agent.make_prepped_xfer(
            "WRITE",
            self._own_generations,
            push.local,
            self._state.peers[push.peer].scratch,
            slots,
            _ANSWER.pack(b"D", push.pull_id),
        )
        self._agent.transfer(push.handle)

    def _guarded_push(self, push: _Push, step: Callable[[_Push], None]) -> None:
        try:
            step(push)
        except Exception as error:
            log.warning("transport: writing to %s failed: %s", push.peer.worker_id, error)
            if push in self._state.pushes:
                self._state.pushes.remove(push)
            self._suspect(push.peer)
            self._refuse(push.peer, self._state.peers[push.peer], push.pull_id)


def _agent_name(peer: PeerId) -> str:
    """Named per incarnation: NIXL refuses a restart under the same name."""
    return f"{peer.worker_id}@{peer.epoch}"


def _address(array: np.ndarray) -> int:
    return int(array.ctypes.data)
