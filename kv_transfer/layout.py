"""How KV lies in memory, and the fingerprint by which two workers know that they agree.

Layers that keep the same tokens, in the same shape, are a *group*. It has blocks of its own:

    heads    [block][layer][k|v][kv_head][slot][head_dim]
    rounded  [block][layer][1][kv_head][slot][row]          in 8 bits: a token's key and value, each with its scale
    latent   [block][layer][1][1][slot][width]              one vector a token for all heads (MLA)
    state    [slot][bytes]                                  one blob a sequence, whatever its length

A block is contiguous over its group's layers: one block is one transfer descriptor, and a range of heads is a fixed set
of slices of it. Block ids count through all groups, so an id says which group it belongs to. A block's name (by its
tokens) is the same in every group; each group finds its own block by it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from typing import Literal

GONE = -1  # in a block table: a block that nobody looks at any more, or never did

_VERSION = 2
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
SCALE_BYTES = 2  # bfloat16
_ROW_ALIGNED = 4

Rounding = Literal["", "int8", "int8_values", "fp8", "fp8_values"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Which tokens a token at position p looks at, itself included: all before it; or the last `window` of them; or
    those of its own chunk, [p // chunk * chunk, p]. `values` > 0: the group is latent, and so many first elements of a
    key are the value. `state`: none; what came before is one blob.
    """

    window: int = 0
    chunk: int = 0
    values: int = 0
    state: bool = False

    def first(self, position: int) -> int:
        """The first token that a token at `position` looks at."""
        if self.window:
            return max(0, position - self.window + 1)
        return position // self.chunk * self.chunk if self.chunk else 0

    def first_block(self, num_tokens: int, block_tokens: int) -> int:
        """Of the blocks of the first `num_tokens` tokens: the first one that any token after them looks at."""
        return self.first(num_tokens) // block_tokens

    def needed(self, num_tokens: int, block_tokens: int) -> range:
        """Which blocks of the first `num_tokens` tokens a reader needs to go on; of a state its one blob."""
        if self.state:
            return range(1)
        return range(self.first_block(num_tokens, block_tokens), -(-num_tokens // block_tokens))

    @property
    def reach(self) -> int:
        """How many tokens it looks at, at most; 0: all, or a state."""
        return self.window or self.chunk

    @property
    def leaves(self) -> bool:
        """Blocks are left behind while a sequence runs."""
        return self.reach > 0

    def __str__(self) -> str:
        if self.state:
            return "state"
        kind = f"window({self.window})" if self.window else f"chunk({self.chunk})" if self.chunk else "full"
        return f"latent {kind}" if self.values else kind


FULL = Rule()


@dataclass(frozen=True, slots=True)
class Group:
    """`layers` by the model's own numbers. `kv_heads` of each, `width` elements a head and token; a state has `width`
    bytes a sequence over all its layers. `rounding`: whose numbers have 8 bits, those of keys and values or of values
    alone; such a group has the rows of `row_parts`.
    """

    rule: Rule
    layers: tuple[int, ...]
    kv_heads: int
    width: int
    dtype: str
    rounding: Rounding = field(default="", repr=False)  # the fingerprint has it

    @property
    def planes(self) -> int:
        """Keys and values, or one for both."""
        return 1 if self.rule.values or self.rounding else 2

    @property
    def rounds_keys(self) -> bool:
        return self.rounding in ("int8", "fp8")

    @property
    def row_parts(self) -> tuple[int, int, int]:
        """Of a rounded token and head: bytes of its key, of its value, and of the row with what aligns the next."""
        small = self.width + SCALE_BYTES  # the numbers, then their scale
        key = small if self.rounds_keys else self.width * _DTYPE_BYTES[self.dtype]
        return key, small, -(-(key + small) // _ROW_ALIGNED) * _ROW_ALIGNED

    @property
    def row_bytes(self) -> int:
        """Of a token and head in one plane."""
        return self.row_parts[2] if self.rounding else self.width * _DTYPE_BYTES[self.dtype]

    @property
    def kind(self) -> Literal["heads", "latent", "state"]:
        return "state" if self.rule.state else "latent" if self.rule.values else "heads"

    @property
    def token_bytes(self) -> int:
        """A token's share of a block; 0 for a state."""
        if self.rule.state:
            return 0
        return len(self.layers) * self.planes * self.kv_heads * self.row_bytes

    @property
    def growing_bytes(self) -> int:
        """What each further token adds to a long sequence."""
        return 0 if self.rule.leaves else self.token_bytes

    @property
    def sequence_bytes(self) -> int:
        """What a long sequence keeps whatever its length: a state, or a window."""
        return self.width if self.rule.state else self.rule.reach * self.token_bytes

    def block_shape(self, block_tokens: int) -> tuple[int, ...]:
        """Elements of `dtype`; a state and a rounded group are of bytes."""
        if self.rule.state:
            return (self.width,)
        last = self.row_bytes if self.rounding else self.width
        return (len(self.layers), self.planes, self.kv_heads, block_tokens, last)

    def block_bytes(self, block_tokens: int) -> int:
        return self.width if self.rule.state else self.token_bytes * block_tokens


@dataclass(frozen=True, slots=True)
class StateUse:
    """Slots of a state group in one step of a sequence. It begins with what `source` holds, -1: with nothing, and
    leaves its end in `target`, another slot, so that a step that failed can be repeated. What stands after the first
    `snapshot_after` of its tokens goes to `snapshot` besides; 0 and -1: nothing does.
    """

    source: int
    target: int
    snapshot_after: int = 0
    snapshot: int = -1

    def shifted(self, base: int) -> StateUse:
        """By the numbers of a pool whose first slot is `base`."""
        source, snapshot = (slot if slot < 0 else slot - base for slot in (self.source, self.snapshot))
        return StateUse(source, self.target - base, self.snapshot_after, snapshot)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """`model_identity` is equal for equal checkpoints that are quantized alike: `weights` says it for people. Workers
    whose layouts differ in anything never exchange KV, but for those that are told to mix schemes of weights: their
    `pairing` must be equal.
    """

    model_identity: str
    block_tokens: int
    groups: tuple[Group, ...]
    weights: str = field(default="", repr=False)  # "int8 mlp"; the identity knows it
    unquantized: str = field(default="", repr=False)  # the identity before that

    @property
    def token_bytes(self) -> int:
        """What a token takes in all groups, while none has left it."""
        return sum(group.token_bytes for group in self.groups)

    @property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(group.rule for group in self.groups)

    @property
    def growing_bytes(self) -> int:
        """What a handoff moves for each block of a prompt, however long it is."""
        return sum(group.growing_bytes for group in self.groups) * self.block_tokens

    @property
    def fixed_bytes(self) -> int:
        """What it moves besides, at most: the blocks of windows and chunks, and states."""
        size = self.block_tokens
        return sum(g.block_bytes(size) * (1 if g.rule.state else -(-g.rule.reach // size)) for g in self.groups)

    @property
    def kept_tokens(self) -> int:
        """Of a sequence, the most that blocks are held for at a time, where every group leaves some behind; 0: all."""
        size = self.block_tokens
        reaches = [group.rule.reach for group in self.groups if not group.rule.state]
        return (-(-max(reaches) // size) + 1) * size if all(reaches) else 0

    @property
    def rounding(self) -> Rounding:
        """Of its groups; states and others that are not rounded beside them say nothing."""
        for group in self.groups:
            if group.rounding:
                return group.rounding
        return ""

    def fingerprint(self) -> str:
        """Readable prefix, then a hash: `kv2-30x3x64-bfloat16-b32-0f3a...`, groups joined by +. Of KV in 8 bits
        `...-bfloat16-kv.int8-b32-...`.
        """
        of = f"diptych-layout-{_VERSION}|{self!r}"
        if self.rounding:
            of += f"|{'+'.join(group.rounding for group in self.groups)}"
        digest = hashlib.sha256(of.encode()).hexdigest()[:16]
        shapes = "+".join(
            f"state{g.width}" if g.rule.state else f"{len(g.layers)}x{g.kv_heads}x{g.width}" for g in self.groups
        )
        weights = f"-{self.weights.replace(' ', '.')}" if self.weights else ""
        weights += f"-kv.{self.rounding}" if self.rounding else ""
        return f"kv{_VERSION}-{shapes}-{self.groups[0].dtype}{weights}-b{self.block_tokens}-{digest}"

    def pairing(self) -> str:
        """The fingerprint as it would be if the weights were not quantized; empty: it is not known."""
        return replace(self, model_identity=self.unquantized, weights="").fingerprint() if self.unquantized else ""


def explain_mismatch(own: str, theirs: str) -> str:
    """For people: two fingerprints that differ, and what to do."""
    here, there = _weights(own), _weights(theirs)
    if here != there:
        return (
            f"the peer's weights are quantized otherwise ({there or 'not at all'}) than this worker's "
            f"({here or 'not at all'}): {theirs} and {own}; give both pools the same engine.quantization and "
            "engine.quantized_groups, or set router.mixed_quantization to true"
        )
    here, there = _rounding(own), _rounding(theirs)
    if here != there:
        return (
            f"the peer keeps its KV as {there or 'model'} and this worker as {here or 'model'}: {theirs} and {own}; "
            "give both pools the same engine.kv_dtype"
        )
    same_shape = own.rsplit("-", 1)[0] == theirs.rsplit("-", 1)[0]
    what = "another checkpoint" if same_shape else "another KV layout"
    return (
        f"the peer serves {what} ({theirs}) than this worker ({own}); "
        "give both pools the same model, dtype and block_tokens"
    )


def _weights(fingerprint: str) -> str:
    found = re.search(r"-((?:int\d+|fp8)\.[a-z+]+)(-kv\.\w+)?-b\d+-", fingerprint)
    return found[1] if found else ""


def _rounding(fingerprint: str) -> str:
    found = re.search(r"-kv\.(\w+)-b\d+-", fingerprint)
    return found[1] if found else ""
