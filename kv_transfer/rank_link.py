"""Moving KV in the other ranks of a worker: at the leader a transport that stands for one of them, there the real one.

    LinkedRank (leader's process) ── a pair of sockets ── serve_rank (the rank's process) ── NixlTransport

The link carries orders and events; bytes of KV go straight into the rank's own memory. `LinkedRank` blocks nobody: a
thread writes and a thread reads. When the link closes, the rank is gone: what it was pulling has ended.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Protocol

from kv_transfer import rank_messages as m
from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerId
from kv_transfer.transport import KvMemory, Parts, PullFinal, PullOrder, PullOutcome, PullStatus, TransportEvent

log = logging.getLogger(__name__)

_OPEN_S = 60.0
_BEAT_EVERY_S = 0.5
_PULL_ID = struct.Struct("<Q")


class RankFailed(Exception):
    """A rank cannot move KV; says which, and why."""


class LinkedRank:
    """`deliver` is called on a thread of its own and must not block."""

    def __init__(self, link: socket.socket, peer: PeerId, deliver: Callable[[TransportEvent], None]) -> None:
        self.peer = peer
        self.name, self._described, self._endpoint = "", "", b""
        self._link, self._deliver = link, deliver
        self._orders: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._open_pulls: dict[int, bool] = {}  # pull id -> its outcome is known
        self._lock = threading.Lock()
        self._here = threading.Event()
        self._refused = ""
        self._alive = True
        self.last_turn = time.monotonic()
        self.oldest_pull_since: float | None = None
        self._threads = [
            threading.Thread(target=self._write, name=f"rank-{peer.rank}-orders", daemon=True),
            threading.Thread(target=self._read, name=f"rank-{peer.rank}-events", daemon=True),
        ]

    def open(self, config: TransportConfig) -> None:
        """Returns when the rank's memory can be reached. Raises RankFailed."""
        for thread in self._threads:
            thread.start()
        self._say(m.OPEN, m.of_peer(self.peer) + m.of_blob(config.model_dump_json().encode()))
        if not self._here.wait(_OPEN_S):
            raise RankFailed(f"rank {self.peer.rank} has not opened its KV transport within {_OPEN_S:g} s")
        if self._refused:
            raise RankFailed(f"rank {self.peer.rank} cannot open its KV transport: {self._refused}")

    # KvTransport.

    def describe(self) -> str:
        return self._described

    def register(self, memory: KvMemory) -> None:
        raise AssertionError("a rank registers its own memory")

    def endpoint(self) -> bytes:
        return self._endpoint

    def connect(self, peer: PeerId, endpoint: bytes, parts: Parts | None = None) -> None:
        self._say(m.CONNECT, m.of_connect(peer, endpoint, parts))

    def disconnect(self, peer: PeerId) -> None:
        self._say(m.DISCONNECT, m.of_peer(peer))

    def reachable(self, peer: PeerId) -> None:
        self._say(m.REACHABLE, m.of_peer(peer))

    def forget(self, peer: PeerId) -> None:
        self._say(m.FORGET, m.of_peer(peer))

    def submit(self, order: PullOrder) -> None:
        with self._lock:
            if self._alive:
                self._open_pulls[order.pull_id] = False
                self._say(m.SUBMIT, m.of_order(order))
                return
        self._deliver(PullOutcome(order.pull_id, PullStatus.PEER_LOST, True, self._gone()))

    def abandon(self, pull_id: int) -> None:
        self._say(m.ABANDON, _PULL_ID.pack(pull_id))

    def close(self, timeout_s: float) -> None:
        self._say(m.CLOSE, struct.pack("<d", timeout_s))
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._orders.put(None)
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(1.0)
        self._link.close()

    @property
    def alive(self) -> bool:
        return self._alive

    # Threads.

    def _say(self, letter: bytes, content: bytes) -> None:
        self._orders.put(m.frame(letter, content))

    def _write(self) -> None:
        while (said := self._orders.get()) is not None:
            try:
                self._link.sendall(said)
            except OSError:
                return  # who reads finds out

    def _read(self) -> None:
        try:
            while (said := receive(self._link)) is not None:
                self._hear(*said)
        except Exception:
            log.exception("the link to rank %d failed", self.peer.rank)
        self._orders.put(None)
        with self._lock:
            self._alive = False
            left, self._open_pulls = self._open_pulls, {}
        self._refused = self._refused or self._gone()
        self._here.set()
        for pull_id, known in left.items():
            if known:
                self._deliver(PullFinal(pull_id))
            else:
                self._deliver(PullOutcome(pull_id, PullStatus.PEER_LOST, True, self._gone()))

    def _hear(self, letter: bytes, content: bytes) -> None:
        match letter:
            case m.HERE:
                fields = m.Fields(content)
                self.name, self._described, self._endpoint = fields.text(), fields.text(), fields.blob()
                self._here.set()
            case m.REFUSED:
                self._refused = content.decode() or "no reason was given"
                self._here.set()
            case m.OUTCOME:
                outcome = m.to_outcome(content)
                with self._lock:
                    if outcome.final:
                        self._open_pulls.pop(outcome.pull_id, None)
                    elif outcome.pull_id in self._open_pulls:
                        self._open_pulls[outcome.pull_id] = True
                self._deliver(outcome)
            case m.FINAL:
                (pull_id,) = _PULL_ID.unpack(content)
                with self._lock:
                    self._open_pulls.pop(pull_id, None)
                self._deliver(PullFinal(pull_id))
            case m.BEAT:
                self.last_turn, self.oldest_pull_since, self._alive = m.to_beat(content)
            case _:
                raise ValueError(f"a message {letter!r}")

    def _gone(self) -> str:
        return f"rank {self.peer.rank} of this worker is gone"


class ServedTransport(Protocol):
    """What `serve_rank` needs of a transport, beside KvTransport."""

    name: str
    last_turn: float
    oldest_pull_since: float | None

    @property
    def alive(self) -> bool: ...

    def describe(self) -> str: ...
    def register(self, memory: KvMemory) -> None: ...
    def endpoint(self) -> bytes: ...
    def connect(self, peer: PeerId, endpoint: bytes, parts: Parts | None = None) -> None: ...
    def disconnect(self, peer: PeerId) -> None: ...
    def reachable(self, peer: PeerId) -> None: ...
    def forget(self, peer: PeerId) -> None: ...
    def submit(self, order: PullOrder) -> None: ...
    def abandon(self, pull_id: int) -> None: ...
    def close(self, timeout_s: float) -> None: ...


Make = Callable[[PeerId, TransportConfig, Callable[[TransportEvent], None]], ServedTransport]


def serve_rank(link: socket.socket, memory: KvMemory, make: Make) -> None:
    """In a rank's process, on a thread of its own, until the link closes. `make`: NixlTransport, but in tests."""
    sending = threading.Lock()  # events come from the transport's thread

    def send(data: bytes) -> None:
        with sending, contextlib.suppress(OSError):
            link.sendall(data)

    said = receive(link)
    if said is None or said[0] != m.OPEN:
        return
    fields = m.Fields(said[1])
    peer, config = fields.peer(), TransportConfig.model_validate_json(fields.blob())
    try:
        transport = make(peer, config, lambda event: send(m.of_event(event)))
        transport.register(memory)
    except Exception as error:
        log.exception("rank %d cannot open its KV transport", peer.rank)
        send(m.frame(m.REFUSED, str(error).encode()))
        return
    parts = (transport.name.encode(), transport.describe().encode(), transport.endpoint())
    send(m.frame(m.HERE, b"".join(map(m.of_blob, parts))))
    patience_s = 1.0
    try:
        patience_s = _obey(link, transport, send)
    except Exception:
        log.exception("rank %d: the link to the leader failed", peer.rank)
    finally:
        transport.close(patience_s)
        with contextlib.suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)


def _obey(link: socket.socket, transport: ServedTransport, send: Callable[[bytes], None]) -> float:
    """Until the leader closes, or is gone: returns how long closing may take."""
    next_beat = time.monotonic()
    while True:
        now = time.monotonic()
        if now >= next_beat:
            next_beat = now + _BEAT_EVERY_S
            send(m.of_beat(transport.last_turn, transport.oldest_pull_since, transport.alive))
        if not select.select([link], [], [], max(0.0, next_beat - now))[0]:
            continue
        said = receive(link)
        if said is None:
            return 1.0
        if said[0] == m.CLOSE:
            return struct.unpack("<d", said[1])[0]
        _do(transport, *said)


def _do(transport: ServedTransport, letter: bytes, content: bytes) -> None:
    match letter:
        case m.CONNECT:
            transport.connect(*m.to_connect(content))
        case m.DISCONNECT:
            transport.disconnect(m.Fields(content).peer())
        case m.REACHABLE:
            transport.reachable(m.Fields(content).peer())
        case m.FORGET:
            transport.forget(m.Fields(content).peer())
        case m.SUBMIT:
            transport.submit(m.to_order(content))
        case m.ABANDON:
            transport.abandon(*_PULL_ID.unpack(content))
        case _:
            raise ValueError(f"a message {letter!r}")


def receive(link: socket.socket) -> tuple[bytes, bytes] | None:
    """The next frame; None: the other side is gone."""
    head = _exactly(link, m.HEAD.size)
    if head is None:
        return None
    size, letter = m.HEAD.unpack(head)
    if size > m.LONGEST:
        raise ValueError(f"a frame of {size} bytes")
    content = _exactly(link, size)
    return None if content is None else (letter, content)


def _exactly(link: socket.socket, size: int) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        try:
            piece = link.recv(size - len(found))
        except OSError:
            return None
        if not piece:
            return None
        found += piece
    return bytes(found)
