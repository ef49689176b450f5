"""What a NIXL peer says of itself. Fixed binary layout, every field checked: it comes from a socket.

magic 8 | host 16 | base, block_bytes, num_blocks, generations, scratch, scratch_slots: 6 x u64 | device: i32 |
    agent metadata
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass

_MAGIC = b"dptnixl1"
_HEADER = struct.Struct("<8s16s6Qi")
_MAX_METADATA_BYTES = 1 << 20
_MAX_ITEMS = 1 << 24  # a descriptor is made of each: without a bound, 80 bytes from a socket fill the memory


@dataclass(frozen=True, slots=True)
class NixlEndpoint:
    """`device` is -1 for host memory, else the CUDA device. `scratch` receives generations written by a source."""

    host: bytes
    base_address: int
    block_bytes: int
    num_blocks: int
    generations_address: int
    scratch_address: int
    scratch_slots: int
    device: int
    metadata: bytes

    def pack(self) -> bytes:
        return (
            _HEADER.pack(
                _MAGIC,
                self.host,
                self.base_address,
                self.block_bytes,
                self.num_blocks,
                self.generations_address,
                self.scratch_address,
                self.scratch_slots,
                self.device,
            )
            + self.metadata
        )

    @classmethod
    def unpack(cls, data: bytes) -> NixlEndpoint:
        """Raises ValueError, naming what is wrong."""
        if len(data) < _HEADER.size or len(data) > _HEADER.size + _MAX_METADATA_BYTES:
            raise ValueError(f"an endpoint of {len(data)} bytes cannot be one")
        magic, host, base, block_bytes, num_blocks, generations, scratch, slots, device = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError(f"the endpoint begins with {magic!r}, expected {_MAGIC!r}: another version of Diptych?")
        endpoint = cls(host, base, block_bytes, num_blocks, generations, scratch, slots, device, data[_HEADER.size :])
        if max(num_blocks, slots) > _MAX_ITEMS:
            raise ValueError(f"the endpoint names {max(num_blocks, slots)} items, the limit is {_MAX_ITEMS}")
        for name, address, items, item_bytes in (
            ("KV pool", base, num_blocks, block_bytes),
            ("generations", generations, num_blocks, 8),
            ("scratch", scratch, slots, 8),
        ):
            if not address or not items or not item_bytes:
                raise ValueError(f"the endpoint's {name} is empty")
            if address + items * item_bytes >= 1 << 64:
                raise ValueError(f"the endpoint's {name} does not fit an address space")
        if device < -1:
            raise ValueError(f"the endpoint is on device {device}; -1 is host memory")
        return endpoint


def host_identity() -> bytes:
    """Equal for processes that can read each other's memory by address: one boot, one process namespace."""
    parts = []
    for path in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        try:
            with open(path, "rb") as f:
                parts.append(f.read().strip())
        except OSError:
            continue
    try:
        parts.append(os.readlink("/proc/self/ns/pid").encode())
    except OSError:
        parts.append(str(os.getpid()).encode())  # unknown: share with nobody
    return hashlib.sha256(b"|".join(parts)).digest()[:16]
