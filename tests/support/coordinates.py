"""KV in which every element says where it belongs: group, layer, plane, head, token and element, in 32 bits.

An element has fewer bits in most types. So a memory is filled, handed over and read in as many passes as it takes:
pass r carries the r-th piece of every coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kv_transfer.layout import Group, KvLayout

POISON = 0xFFFFFFFF  # no coordinate: as bytes, 0xFF everywhere
POISON_BYTE = 0xFF
_FIELDS = (("group", 3), ("layer", 6), ("plane", 1), ("head", 4), ("token", 11), ("element", 7))
_STATE_ELEMENT_BYTES = 4  # a state has bytes of its own making; four of them are an element here


Numbers = int | np.ndarray


def coordinate(
    group: Numbers, layer: Numbers, plane: Numbers, head: Numbers, token: Numbers, element: Numbers
) -> np.ndarray:
    """`layer`, `head` and `token` by the numbers of the model and the sequence, wherever they lie."""
    code = np.zeros((), dtype=np.int64)
    for (name, bits), value in zip(_FIELDS, (group, layer, plane, head, token, element), strict=True):
        values = np.asarray(value)
        assert values.min() >= 0, name
        assert values.max() < (1 << bits) - (name == "group"), f"{name} {values.max()}: too large for {bits} bits"
        code = (code << bits) | values
    return code.astype(np.uint32)


def told(code: int) -> str:
    """For people."""
    if code == POISON:
        return "poison"
    words = []
    for name, bits in reversed(_FIELDS):
        words.append(f"{name} {code & ((1 << bits) - 1)}")
        code >>= bits
    return " ".join(reversed(words))


def element_bytes(layout: KvLayout, group: Group) -> int:
    if group.rule.state:
        return _STATE_ELEMENT_BYTES
    return group.block_bytes(layout.block_tokens) // int(np.prod(group.block_shape(layout.block_tokens)))


def passes(layout: KvLayout) -> int:
    return max(4 // element_bytes(layout, group) for group in layout.groups)


def block_of(layout: KvLayout, number: int, index: int, heads: Sequence[int] | None = None) -> np.ndarray:
    """What block `index` of a sequence holds in a group; of some of the heads, in a memory that holds no others."""
    group = layout.groups[number]
    assert not group.rule.state
    axes = (
        group.layers,
        range(group.planes),
        range(group.kv_heads) if heads is None else heads,
        range(index * layout.block_tokens, (index + 1) * layout.block_tokens),
        range(group.block_shape(1)[-1]),
    )
    return coordinate(number, *np.ix_(*axes))


def state_of(layout: KvLayout, number: int, num_tokens: int) -> np.ndarray:
    """The state after so many tokens: each layer has an equal part of its bytes."""
    group = layout.groups[number]
    elements, rest = divmod(group.width, len(group.layers) * _STATE_ELEMENT_BYTES)
    assert rest == 0
    layers, _, _, _, element = np.ix_(group.layers, (0,), (0,), (0,), range(elements))
    return coordinate(number, layers, 0, 0, num_tokens, element).reshape(-1)


def packed(codes: np.ndarray, size: int, number: int) -> np.ndarray:
    """The bytes of a block whose elements have `size` bytes, in pass `number`."""
    piece = codes.reshape(-1) >> np.uint32(8 * size * (number % (4 // size)))
    return piece.astype(f"<u{size}").view(np.uint8)


def unpacked(seen: Sequence[np.ndarray], size: int) -> np.ndarray:
    """The coordinates in a block, of what it held in each pass."""
    codes = np.zeros(len(seen[0]) // size, dtype=np.uint32)
    for number in range(4 // size):
        codes |= seen[number].view(f"<u{size}").astype(np.uint32) << np.uint32(8 * size * number)
    return codes
