"""KV over NIXL (UCX): RDMA, NVLink, shared memory or TCP, whatever UCX finds between two pools.

One agent per process, touched by one owner thread only: without that, several threads crash it. The thread polls; that
also makes the progress which a passive side owes its peers (NIXL's own progress thread spins on a core).

    other threads ── commands ──> owner thread ──> nixl_peers   the ways to others, replaced when they broke
                                       │           nixl_pulls   what we read, or ask a source to write
    deliver(event) <───────────────────┘           nixl_pushes  what a reader asked us to write
                                                   nixl_agent   NIXL itself, and our memory
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerId
from kv_transfer.nixl_agent import NixlAgent
from kv_transfer.nixl_messages import ASK, DONE, FAILED, PARTS, REQUEST, unpack_answer
from kv_transfer.nixl_peers import Peers
from kv_transfer.nixl_pulls import Pulls
from kv_transfer.nixl_pushes import Pushes
from kv_transfer.transport import KvMemory, Parts, PullOrder, TransportEvent

log = logging.getLogger(__name__)

_BUSY_POLL_S = 50e-6
_IDLE_POLL_S = 1e-3
_REST_POLL_S = 5e-3  # after a while without any transfer
_REST_AFTER_S = 2.0
_MAX_EARLY = 256


class NixlTransport:
    """`deliver` is called on the owner thread and must not block."""

    name = "nixl"

    def __init__(self, peer: PeerId, config: TransportConfig, deliver: Callable[[TransportEvent], None]) -> None:
        self.peer = peer
        self._config = config
        self._deliver = deliver
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._last_activity = 0.0
        self._early: deque[tuple[str, bytes]] = deque(maxlen=_MAX_EARLY)  # requests of peers that we do not know yet
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
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed

    def endpoint(self) -> bytes:
        return self._agent.endpoint.pack()

    def connect(self, peer: PeerId, endpoint: bytes, parts: Parts | None = None) -> None:
        self._commands.put(lambda: self._connect(peer, endpoint, parts))

    def disconnect(self, peer: PeerId) -> None:
        self._commands.put(lambda: self._disconnect(peer))

    def reachable(self, peer: PeerId) -> None:
        """A word came from there this moment. Only then is a dead endpoint replaced: reaching for a peer that does
        not answer would block the thread that serves all others.
        """
        self._commands.put(lambda: self._peers.revive(peer, self._under_way))

    def forget(self, peer: PeerId) -> None:
        """It will not come back. Its writes into our blocks are over a while after that."""
        self._commands.put(lambda: self._gone(peer))

    def submit(self, order: PullOrder) -> None:
        self._commands.put(lambda: self._pulls.submit(order))

    def abandon(self, pull_id: int) -> None:
        self._commands.put(lambda: self._pulls.abandon(pull_id))

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
        """From here on only this thread touches them."""
        self._agent = NixlAgent(self.peer, self._config, self._memory)
        self._peers = Peers(self._agent, self._config)
        self._pulls = Pulls(self._agent, self._peers, self._config, self._deliver)
        self._pushes = Pushes(self._agent, self._peers)

    def _turn(self) -> bool:
        """One round; False when asked to close."""
        pulls, pushes = self._pulls, self._pushes
        self.last_turn = now = time.monotonic()
        if pulls.live or pushes.live:
            self._last_activity = now
            wait_s = _BUSY_POLL_S
        else:
            wait_s = _IDLE_POLL_S if now - self._last_activity < _REST_AFTER_S else _REST_POLL_S
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
        for push in list(pushes.live):
            self._guard(lambda p=push: pushes.advance(p))
        oldest: float | None = None
        for pull in list(pulls.live.values()):  # in the order of submission
            pulls.advance(pull, now)
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
        self._pulls.close()
        self._peers.close()
        # Registered memory stays registered: a peer's transfer into it may still be under way.

    def _connect(self, peer: PeerId, endpoint: bytes, parts: Parts | None) -> None:
        if self._peers.get(peer) is not None:
            self._peers.connect_again(peer)
            self._peers.revive(peer, self._under_way)
        elif self._peers.connect(peer, endpoint, parts):
            self._pulls.superseded(peer)
            early, self._early = list(self._early), deque(maxlen=_MAX_EARLY)
            for sender, message in early:
                self._guard(lambda s=sender, m=message: self._notified(s, m))

    def _disconnect(self, peer: PeerId) -> None:
        self._peers.disconnect(peer)
        self._pulls.disconnected(peer)

    def _gone(self, peer: PeerId) -> None:
        self._disconnect(peer)
        self._peers.gone(peer)

    def _under_way(self, peer: PeerId) -> bool:
        return self._pulls.reads_from(peer) or self._pushes.writes_to(peer)

    def _take_notifications(self) -> None:
        for name, messages in self._agent.nixl.get_new_notifs().items():
            sender = name.decode() if isinstance(name, bytes) else name
            for message in messages:
                self._guard(lambda s=sender, m=message: self._notified(s, m))

    def _notified(self, sender: str, message: bytes) -> None:
        peer = self._peers.named(sender)
        if peer is None:  # a rank of a reader may ask before we hear from its leader that it exists
            if message[:1] in (REQUEST, PARTS):
                self._early.append((sender, message))
            else:
                log.warning("transport: a notification from %s, which is not connected", sender)
            return
        if message[:1] in (REQUEST, PARTS):
            self._pushes.serve(peer, message)
            return
        letter, pull_id = unpack_answer(message) or (b"", 0)
        if letter == ASK:
            self._pushes.tell_whether_over(peer, pull_id)
        elif letter in (DONE, FAILED):
            self._pulls.answered(peer, letter, pull_id)
