"""What a forward pass is told, as bytes: 32-bit numbers one after the other, without names.

    tokens  keep  chunks  further groups            how many of each
    token ids, positions, rows to keep
    per chunk: first row, tokens, start, length of its table in each group, the tables,
               0, or 1 and the four numbers of its state; how many copies of blocks, and from where to where

Written and read in the step's own path: no pickle, no JSON.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from engine.attention.interface import Chunk
from kv_transfer.layout import StateUse

_KIND = "i"


@dataclass(frozen=True, slots=True)
class Pass:
    token_ids: list[int]
    positions: list[int]
    chunks: list[Chunk]
    keep: list[int]


def encode(token_ids: Sequence[int], positions: Sequence[int], chunks: Sequence[Chunk], keep: Sequence[int]) -> bytes:
    others = len(chunks[0].others) if chunks else 0
    out = array(_KIND, (len(token_ids), len(keep), len(chunks), others))
    for numbers in (token_ids, positions, keep):
        out.extend(numbers)
    for chunk in chunks:
        tables = (chunk.block_ids, *chunk.others)
        out.extend((chunk.first_row, chunk.num_tokens, chunk.start, *map(len, tables)))
        for table in tables:
            out.extend(table)
        state = chunk.state
        out.extend((0,) if state is None else (1, state.source, state.target, state.snapshot_after, state.snapshot))
        out.append(len(chunk.copies))
        for pair in chunk.copies:
            out.extend(pair)
    return out.tobytes()


def decode(message: bytes | bytearray | memoryview) -> Pass:
    numbers = array(_KIND)
    numbers.frombytes(message)
    tokens, kept, count, others = numbers[:4]
    at = 4

    def take(length: int) -> list[int]:
        nonlocal at
        at += length
        return numbers[at - length : at].tolist()

    token_ids, positions, keep = take(tokens), take(tokens), take(kept)
    chunks: list[Chunk] = []
    for _ in range(count):
        first_row, num_tokens, start, *lengths = take(4 + others)
        table, *further = [take(length) for length in lengths]
        state = StateUse(*take(4)) if take(1)[0] else None
        copies = tuple((source, target) for source, target in (take(2) for _ in range(take(1)[0])))
        chunks.append(Chunk(first_row, num_tokens, start, table, tuple(further), state, copies))
    if at != len(numbers):
        raise ValueError(f"a message of {len(numbers)} numbers, of which {at} were expected")
    return Pass(token_ids, positions, chunks, keep)
