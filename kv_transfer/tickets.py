"""Tickets: a reader attaches to a source, and follows a handoff, only where a router sent it.

A router that knows the cluster secret signs; the source, which knows it too, checks. A ticket names who reads, from
whom, what, and until when, each with its epoch; so it is of no use to another worker, at another worker, for another
handoff, after a restart of either, or later. Any router's ticket is good at any worker, and survives the router.

    ticket = until (u64, ms since 1970) | HMAC-SHA256(kind, handoff, source and its epoch, reader and its epoch, until)

Whoever knows the secret can sign: tickets keep strangers out, not one member of the cluster from another. Without TLS a
ticket can be overheard and used from the reader's name until it expires. Pure, but for the secret's file.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Protocol, TypeVar

from kv_transfer.handoff import PeerId

INTRODUCTION_S = 600.0
RENEW_INTRODUCTION_S = 120.0
HANDOFF_S = 120.0
_MOST_S = INTRODUCTION_S + 120.0  # clocks may differ by two minutes
_BYTES = 8 + 32
_MAX_KEPT = 1 << 14

K = TypeVar("K")


class Signer(Protocol):
    def sign(self, purpose: bytes, message: bytes) -> bytes: ...

    def verify(self, purpose: bytes, message: bytes, mac: bytes) -> bool: ...


def _message(handoff_id: str, source: PeerId, reader: PeerId, until_ms: int) -> bytes:
    """Lengths before texts: no two sets of values give the same bytes."""
    parts = [struct.pack("<QQQ", source.epoch, reader.epoch, until_ms)]
    for text in (handoff_id, source.worker_id, reader.worker_id):
        data = text.encode()
        parts += (struct.pack("<I", len(data)), data)
    return b"".join(parts)


def _make(signer: Signer, kind: bytes, handoff_id: str, source: PeerId, reader: PeerId, until_s: float) -> bytes:
    until_ms = int(until_s * 1e3)
    return struct.pack("<Q", until_ms) + signer.sign(kind, _message(handoff_id, source, reader, until_ms))


def _check(
    signer: Signer, kind: bytes, handoff_id: str, source: PeerId, reader: PeerId, ticket: bytes, wall_now: float
) -> str:
    if not ticket:
        return "there is no ticket; routers and workers need the same security.cluster_secret"
    if len(ticket) != _BYTES:
        return "the ticket is malformed"
    (until_ms,) = struct.unpack_from("<Q", ticket)
    if not signer.verify(kind, _message(handoff_id, source, reader, until_ms), ticket[8:]):
        return "the ticket is not for this, or not from a router of this cluster"
    if until_ms > (wall_now + _MOST_S) * 1e3:  # of a clock that is far ahead, or made to hold for ever
        return "the ticket is dated in the future: the clocks of router and workers differ by minutes"
    if until_ms < wall_now * 1e3:
        return "the ticket has expired; are the hosts' clocks minutes apart?"
    return ""


def introduction(signer: Signer, source: PeerId, reader: PeerId, wall_now: float) -> bytes:
    return _make(signer, b"introduction", "", source, reader, wall_now + INTRODUCTION_S)


def check_introduction(signer: Signer, source: PeerId, reader: PeerId, ticket: bytes, wall_now: float) -> str:
    """Empty if it is good; else why not."""
    return _check(signer, b"introduction", "", source, reader, ticket, wall_now)


def handoff(signer: Signer, handoff_id: str, source: PeerId, reader: PeerId, wall_now: float) -> bytes:
    return _make(signer, b"handoff", handoff_id, source, reader, wall_now + HANDOFF_S)


def reference(signer: Signer, handoff_id: str, source: PeerId, reader: PeerId, wall_now: float) -> bytes:
    """What goes into a HandoffRef: the handoff's ticket, and an introduction in case there was none."""
    return handoff(signer, handoff_id, source, reader, wall_now) + introduction(signer, source, reader, wall_now)


def check_handoff(
    signer: Signer, handoff_id: str, source: PeerId, reader: PeerId, ticket: bytes, wall_now: float
) -> str:
    """Empty if it is good; else why not."""
    return _check(signer, b"handoff", handoff_id, source, reader, ticket, wall_now)


def answer(signer: Signer, source: PeerId, reader: PeerId, ticket: bytes) -> bytes:
    """The source's side of the greeting: it knows the secret, and saw this ticket."""
    return signer.sign(b"answer", _message("", source, reader, 0) + ticket)


def check_answer(signer: Signer, source: PeerId, reader: PeerId, ticket: bytes, proof: bytes) -> str:
    """Empty if it is good; else why not."""
    good = signer.verify(b"answer", _message("", source, reader, 0) + ticket, proof)
    return "" if good else "who answers there does not know the cluster secret"


class Wallet:
    """A reader's tickets, as routers sent them. Bounded; the oldest go first."""

    def __init__(self) -> None:
        self._introductions: OrderedDict[PeerId, bytes] = OrderedDict()
        self._handoffs: OrderedDict[str, bytes] = OrderedDict()

    def __repr__(self) -> str:
        return f"Wallet({len(self._introductions)} introductions, {len(self._handoffs)} handoffs)"

    def keep_introduction(self, source: PeerId, ticket: bytes) -> None:
        if ticket:
            _keep(self._introductions, source, ticket)

    def keep_handoff(self, handoff_id: str, ticket: bytes) -> None:
        if ticket:
            _keep(self._handoffs, handoff_id, ticket)

    def keep_reference(self, handoff_id: str, source: PeerId, ticket: bytes) -> None:
        """As `reference` made it."""
        self.keep_handoff(handoff_id, ticket[:_BYTES])
        self.keep_introduction(source, ticket[_BYTES:])

    def introduction(self, source: PeerId) -> bytes:
        return self._introductions.get(source, b"")

    def handoff(self, handoff_id: str) -> bytes:
        return self._handoffs.get(handoff_id, b"")


def _keep(tickets: OrderedDict[K, bytes], name: K, ticket: bytes) -> None:
    tickets[name] = ticket
    tickets.move_to_end(name)
    if len(tickets) > _MAX_KEPT:
        tickets.popitem(last=False)
