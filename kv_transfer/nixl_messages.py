"""What two NIXL peers tell each other in write mode, as notifications: one letter, then fixed fields.

reader ── R request ──> source     write these blocks of yours into those of mine
reader ── P parts ────> source     likewise, of every block these runs of bytes; or the generations alone
reader <── D done ───── source     behind the generations, on the same way
reader <── F failed ─── source     nothing was written, or nothing more will be
reader ── Q ──────────> source     is it over? Silence while it writes, else F
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kv_transfer.handoff import MAX_GROUPS
from kv_transfer.transport import Parts, Slice, Slices

REQUEST, PARTS, DONE, FAILED, ASK = b"R", b"P", b"D", b"F", b"Q"
_REQUEST = struct.Struct("<cQII")  # letter, pull id, first scratch slot, blocks; then remote ids, local ids (u32)
_PARTS = struct.Struct("<cQIIII")  # letter, pull id, first scratch slot, blocks, of these to be moved, areas
_ANSWER = struct.Struct("<cQ")  # letter, pull id
_MAX_SLICES = 1 << 16


def pack_request(pull_id: int, first_slot: int, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> bytes:
    ids = np.asarray((remote_blocks, local_blocks), dtype="<u4").tobytes()  # none in a probe
    return _REQUEST.pack(REQUEST, pull_id, first_slot, len(local_blocks)) + ids


def pack_parts(
    pull_id: int, first_slot: int, remote_blocks: Sequence[int], local_blocks: Sequence[int], parts: Parts
) -> bytes:
    """After the ids: how many slices each area has, then all of them, three numbers each."""
    header = _PARTS.pack(PARTS, pull_id, first_slot, len(remote_blocks), len(local_blocks), len(parts))
    numbers = [*remote_blocks, *local_blocks, *(len(part.slices) for part in parts)]
    numbers += [number for part in parts for one in part.slices for number in one]
    return header + np.asarray(numbers, dtype="<u4").tobytes()


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as it came: a peer wrote it, so nothing is checked yet. `slices`: by area; None: blocks are whole."""

    pull_id: int
    first_slot: int
    remote: list[int]
    local: list[int]
    slices: Slices | None = None


def unpack_request(message: bytes) -> Asked:
    """Raises struct.error or ValueError for what is none."""
    if message[:1] == PARTS:
        return _unpack_parts(message)
    _, pull_id, first_slot, count = _REQUEST.unpack_from(message)
    ids = np.frombuffer(message, dtype="<u4", offset=_REQUEST.size).tolist()
    return Asked(pull_id, first_slot, ids[:count], ids[count:])


def _unpack_parts(message: bytes) -> Asked:
    _, pull_id, first_slot, count, moved, areas = _PARTS.unpack_from(message)
    numbers = np.frombuffer(message, dtype="<u4", offset=_PARTS.size).tolist()
    ids, at = count + moved, count + moved + areas
    counts = numbers[ids:at]
    if areas > MAX_GROUPS or sum(counts) > _MAX_SLICES or len(numbers) != at + 3 * sum(counts):
        return Asked(pull_id, first_slot, [], [0])  # what nobody can serve: it is refused by its number
    slices: list[tuple[Slice, ...]] = []
    for count_of_area in counts:
        slices.append(tuple(Slice(*numbers[i : i + 3]) for i in range(at, at + 3 * count_of_area, 3)))
        at += 3 * count_of_area
    return Asked(pull_id, first_slot, numbers[:count], numbers[count:ids], tuple(slices))


def pack_answer(letter: bytes, pull_id: int) -> bytes:
    return _ANSWER.pack(letter, pull_id)


def unpack_answer(message: bytes) -> tuple[bytes, int] | None:
    """Letter and pull id; None for what is none."""
    return _ANSWER.unpack(message) if len(message) == _ANSWER.size else None
