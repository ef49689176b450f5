"""What two NIXL peers tell each other in write mode, as notifications: one letter, then fixed fields.

reader ── R request ──> source     write these blocks of yours into those of mine
reader <── D done ───── source     behind the generations, on the same way
reader <── F failed ─── source     nothing was written, or nothing more will be
reader ── Q ──────────> source     is it over? Silence while it writes, else F
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

REQUEST, DONE, FAILED, ASK = b"R", b"D", b"F", b"Q"
_REQUEST = struct.Struct("<cQII")  # letter, pull id, first scratch slot, blocks; then remote ids, local ids (u32)
_ANSWER = struct.Struct("<cQ")  # letter, pull id


def pack_request(pull_id: int, first_slot: int, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> bytes:
    ids = np.asarray((remote_blocks, local_blocks), dtype="<u4").tobytes()  # none in a probe
    return _REQUEST.pack(REQUEST, pull_id, first_slot, len(local_blocks)) + ids


def unpack_request(message: bytes) -> tuple[int, int, int, np.ndarray]:
    """Pull id, first scratch slot, blocks, and all ids that came: a peer wrote them, so nothing is checked yet."""
    _, pull_id, first_slot, count = _REQUEST.unpack_from(message)
    return pull_id, first_slot, count, np.frombuffer(message, dtype="<u4", offset=_REQUEST.size)


def pack_answer(letter: bytes, pull_id: int) -> bytes:
    return _ANSWER.pack(letter, pull_id)


def unpack_answer(message: bytes) -> tuple[bytes, int] | None:
    """Letter and pull id; None for what is none."""
    return _ANSWER.unpack(message) if len(message) == _ANSWER.size else None
