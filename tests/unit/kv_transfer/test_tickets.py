"""Tickets hold for exactly what they name."""

from __future__ import annotations

import hmac
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import tickets
from kv_transfer.handoff import PeerId

P, D = PeerId("prefill-0", 11), PeerId("decode-0", 22)


class Key:
    def __init__(self, key: bytes) -> None:
        self.key = key

    def sign(self, purpose: bytes, message: bytes) -> bytes:
        return hmac.digest(self.key, purpose + b"/" + message, "sha256")

    def verify(self, purpose: bytes, message: bytes, mac: bytes) -> bool:
        return hmac.compare_digest(self.sign(purpose, message), mac)


OURS, THEIRS = Key(b"ours"), Key(b"theirs")


def test_a_ticket_is_good_for_what_it_names_until_it_expires() -> None:
    ticket = tickets.handoff(OURS, "h1", P, D, 1000.0)
    assert tickets.check_handoff(OURS, "h1", P, D, ticket, 1000.0) == ""
    assert tickets.check_handoff(OURS, "h1", P, D, ticket, 1000.0 + tickets.HANDOFF_S) == ""
    assert "expired" in tickets.check_handoff(OURS, "h1", P, D, ticket, 1000.1 + tickets.HANDOFF_S)
    ahead = tickets.handoff(OURS, "h1", P, D, 1e9)
    assert "in the future" in tickets.check_handoff(OURS, "h1", P, D, ahead, 1000.0)


@pytest.mark.parametrize(
    ("handoff_id", "source", "reader"),
    [
        ("h2", P, D),
        ("h1", replace(P, epoch=12), D),
        ("h1", P, replace(D, epoch=23)),
        ("h1", replace(P, worker_id="prefill-1"), D),
        ("h1", P, replace(D, worker_id="decode-1")),
        ("h1", D, P),
    ],
)
def test_it_is_no_good_for_anything_else(handoff_id: str, source: PeerId, reader: PeerId) -> None:
    ticket = tickets.handoff(OURS, "h1", P, D, 1000.0)
    assert "not for this" in tickets.check_handoff(OURS, handoff_id, source, reader, ticket, 1000.0)


def test_kinds_and_clusters_are_apart() -> None:
    introduction, handoff = tickets.introduction(OURS, P, D, 0.0), tickets.handoff(OURS, "", P, D, 0.0)
    assert tickets.check_introduction(OURS, P, D, introduction, 0.0) == ""
    assert tickets.check_introduction(OURS, P, D, handoff, 0.0)
    assert tickets.check_handoff(OURS, "", P, D, introduction, 0.0)
    assert tickets.check_introduction(THEIRS, P, D, introduction, 0.0)
    assert "no ticket" in tickets.check_introduction(OURS, P, D, b"", 0.0)


@given(at=st.integers(0, 39), flip=st.integers(1, 255))
def test_a_changed_byte_ends_it(at: int, flip: int) -> None:
    ticket = bytearray(tickets.handoff(OURS, "h1", P, D, 1000.0))
    ticket[at] ^= flip
    assert tickets.check_handoff(OURS, "h1", P, D, bytes(ticket), 1000.0)


@given(data=st.binary(max_size=100))
def test_any_bytes_are_refused(data: bytes) -> None:
    assert tickets.check_handoff(OURS, "h1", P, D, data, 0.0)


def test_the_source_proves_that_it_knows_the_secret() -> None:
    ticket = tickets.introduction(OURS, P, D, 0.0)
    proof = tickets.answer(OURS, P, D, ticket)
    assert tickets.check_answer(OURS, P, D, ticket, proof) == ""
    assert tickets.check_answer(OURS, P, D, ticket, tickets.answer(THEIRS, P, D, ticket))
    assert tickets.check_answer(OURS, P, D, ticket, ticket[8:])


def test_a_wallet_takes_references_apart_and_is_bounded() -> None:
    wallet = tickets.Wallet()
    wallet.keep_reference("h1", P, tickets.reference(OURS, "h1", P, D, 5.0))
    assert tickets.check_handoff(OURS, "h1", P, D, wallet.handoff("h1"), 5.0) == ""
    assert tickets.check_introduction(OURS, P, D, wallet.introduction(P), 5.0) == ""
    for number in range(tickets._MAX_KEPT + 1):
        wallet.keep_handoff(f"x{number}", b"t")
    assert wallet.handoff("h1") == b""
    assert wallet.handoff("unheard of") == b""
