"""What the leader of a worker and its other ranks tell each other about moving KV, as bytes.

leader ── OPEN ──────> rank     who it is, and how it is to move KV        HERE ──> its endpoint; or REFUSED, and why
       ── CONNECT, DISCONNECT, REACHABLE, FORGET a peer's rank; SUBMIT an order; ABANDON one; CLOSE
rank   ── OUTCOME, FINAL ──> leader     of a pull
       ── BEAT ────────────> leader     twice a second: how long ago its transport came round, and its oldest pull began

A frame is its length, a letter and fields of fixed width, little-endian; before texts and byte strings stands their
length. Both ends are one program, started together: no versions, and no pickle.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from kv_transfer.handoff import PeerId
from kv_transfer.transport import AreaParts, Parts, PullFinal, PullOrder, PullOutcome, PullStatus, Slice, TransportEvent

OPEN, HERE, REFUSED, CLOSE = b"O", b"H", b"R", b"X"
CONNECT, DISCONNECT, REACHABLE, FORGET = b"C", b"D", b"W", b"G"
SUBMIT, ABANDON, OUTCOME, FINAL, BEAT = b"S", b"A", b"U", b"F", b"B"

HEAD = struct.Struct("<Ic")  # bytes after the head, letter
LONGEST = 64 << 20
_STATUSES = tuple(PullStatus)
_PEER = struct.Struct("<QI")
_SIZE = struct.Struct("<I")
_AREA = struct.Struct("<QQI")
_SLICE = struct.Struct("<QQQ")
_ORDER = struct.Struct("<QdIIII")
_OUTCOME = struct.Struct("<QB?d")
_BEAT = struct.Struct("<ddd?")


def frame(letter: bytes, content: bytes = b"") -> bytes:
    return HEAD.pack(len(content), letter) + content


class Fields:
    """Reads one after the other. Raises ValueError for what ends too early, or goes on."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, what: struct.Struct) -> tuple[Any, ...]:
        return what.unpack(self._bytes(what.size))

    def _bytes(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise ValueError(f"a message of {len(self._data)} bytes ends within a field")
        found, self._at = self._data[self._at : end], end
        return found

    def blob(self) -> bytes:
        return self._bytes(*self.take(_SIZE))

    def text(self) -> str:
        return self.blob().decode()

    def peer(self) -> PeerId:
        worker_id = self.text()
        return PeerId(worker_id, *self.take(_PEER))

    def numbers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}Q", self._bytes(8 * count))

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError(f"{len(self._data) - self._at} bytes behind a message")


def of_blob(data: bytes) -> bytes:
    return _SIZE.pack(len(data)) + data


def of_peer(peer: PeerId) -> bytes:
    return of_blob(peer.worker_id.encode()) + _PEER.pack(peer.epoch, peer.rank)


def of_connect(peer: PeerId, endpoint: bytes, parts: Parts | None) -> bytes:
    areas = () if parts is None else parts
    said = [of_peer(peer), of_blob(endpoint), _SIZE.pack(len(areas))]
    for part in areas:
        said.append(_AREA.pack(part.reader_bytes, part.source_bytes, len(part.slices)))
        said += (_SLICE.pack(*one) for one in part.slices)
    return b"".join(said)


def to_connect(data: bytes) -> tuple[PeerId, bytes, Parts | None]:
    fields = Fields(data)
    peer, endpoint = fields.peer(), fields.blob()
    parts: list[AreaParts] = []
    for _ in range(*fields.take(_SIZE)):
        at_reader, at_source, count = fields.take(_AREA)
        parts.append(AreaParts(at_reader, at_source, tuple(Slice(*fields.take(_SLICE)) for _ in range(count))))
    fields.end()
    return peer, endpoint, tuple(parts) or None


def of_order(order: PullOrder) -> bytes:
    columns: tuple[Sequence[int], ...] = (order.remote_blocks, order.local_blocks, order.generations, order.digests)
    numbers = [number for column in columns for number in column]
    head = _ORDER.pack(order.pull_id, order.timeout_s, *map(len, columns))
    return of_peer(order.source) + head + struct.pack(f"<{len(numbers)}Q", *numbers)


def to_order(data: bytes) -> PullOrder:
    fields = Fields(data)
    source = fields.peer()
    pull_id, timeout_s, *counts = fields.take(_ORDER)
    remote, local, generations, digests = (fields.numbers(count) for count in counts)
    fields.end()
    return PullOrder(pull_id, source, remote, local, generations, digests, timeout_s)


def of_event(event: TransportEvent) -> bytes:
    """The whole frame."""
    if isinstance(event, PullFinal):
        return frame(FINAL, struct.pack("<Q", event.pull_id))
    status = _STATUSES.index(event.status)
    said = _OUTCOME.pack(event.pull_id, status, event.final, event.duration_s)
    return frame(OUTCOME, said + of_blob(event.detail.encode()))


def to_outcome(data: bytes) -> PullOutcome:
    fields = Fields(data)
    pull_id, status, final, duration_s = fields.take(_OUTCOME)
    detail = fields.text()
    fields.end()
    if status >= len(_STATUSES):
        raise ValueError(f"an outcome {status}")
    return PullOutcome(pull_id, _STATUSES[status], final, detail, duration_s)


def of_beat(last_turn: float, oldest_pull_since: float | None, alive: bool) -> bytes:
    """The whole frame. Times are of CLOCK_MONOTONIC, which all processes of a host share: an age would change by what
    its beat takes, and a stamp that stands still would seem to move.
    """
    there = oldest_pull_since is not None
    return frame(BEAT, _BEAT.pack(last_turn, oldest_pull_since or 0.0, float(there), alive))


def to_beat(data: bytes) -> tuple[float, float | None, bool]:
    last_turn, oldest_pull_since, there, alive = _BEAT.unpack(data)
    return last_turn, oldest_pull_since if there else None, alive
