"""Names of KV blocks: equal name, equal content, in every process.

A block's KV depends on all tokens before it, so a name is chained: hash(parent's name, own tokens). The root covers a
format version, the model and layout (`identity`), the block size, the tenant's salt, the rotary table where there are
two, and the adapter where there is one. Names are cryptographic (SHA-256, first 16 bytes): a collision would be a
silent wrong answer (docs/decisions/0005-block-hash.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

HASH_BYTES = 16
_VERSION = b"diptych-block-1"


def root_hash(identity: str, block_tokens: int, salt: str, *, long: bool = False, adapter: str = "") -> bytes:
    """The parent of a sequence's first block. `long`: its positions are turned by the long one of two rotary tables
    (engine/longrope.py), so it shares no KV with a sequence that begins alike and has the short one.
    `adapter`: its digest; empty: none.
    """
    h = hashlib.sha256(_VERSION)
    named = (b"adapter", adapter.encode()) if adapter else ()
    for part in (identity.encode(), str(block_tokens).encode(), salt.encode(), *(b"long",) * long, *named):
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()[:HASH_BYTES]


def chain_hashes(tokens: Sequence[int], block_tokens: int, parent: bytes) -> list[bytes]:
    """Names of the full blocks of `tokens` that follow `parent` (root_hash for a whole prompt).

    Tokens beyond the last full block are ignored.
    """
    num_blocks = len(tokens) // block_tokens
    if num_blocks == 0:
        return []
    data = np.asarray(tokens[: num_blocks * block_tokens], dtype="<u4").tobytes()
    width = 4 * block_tokens
    sha256 = hashlib.sha256
    names: list[bytes] = []
    for start in range(0, len(data), width):
        parent = sha256(parent + data[start : start + width]).digest()[:HASH_BYTES]
        names.append(parent)
    return names
