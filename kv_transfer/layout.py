"""How a KV block lies in memory, and the fingerprint by which two workers know that they agree.

    [block][layer][k|v][kv_head][slot][head_dim]

A block is contiguous over all layers: one block is one transfer descriptor, and a range of heads is a fixed set of
slices of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

_VERSION = 1
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """`model_identity` is equal for equal checkpoints. Workers whose layouts differ in anything never exchange KV."""

    model_identity: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int

    @property
    def token_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * _DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens

    def fingerprint(self) -> str:
        """Readable prefix, then a hash: `kv1-30x3x64-bfloat16-b32-0f3a...`."""
        values = "|".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        digest = hashlib.sha256(f"diptych-layout-{_VERSION}|{values}".encode()).hexdigest()[:16]
        return (
            f"kv{_VERSION}-{self.num_layers}x{self.num_kv_heads}x{self.head_dim}"
            f"-{self.dtype}-b{self.block_tokens}-{digest}"
        )


def explain_mismatch(own: str, theirs: str) -> str:
    """For people: two fingerprints that differ, and what to do."""
    same_shape = own.rsplit("-", 1)[0] == theirs.rsplit("-", 1)[0]
    what = "another checkpoint" if same_shape else "another KV layout"
    return (
        f"the peer serves {what} ({theirs}) than this worker ({own}); "
        "give both pools the same model, dtype and block_tokens"
    )
