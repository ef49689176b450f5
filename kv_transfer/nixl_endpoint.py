"""What a NIXL peer says of itself. Fixed binary layout, every field checked: it comes from a socket.

magic 8 | host 16 | generations, scratch, scratch_slots: 3 x u64 | device: i32 | areas: u32 |
    for each area: base, block_bytes, num_blocks: 3 x u64 | agent metadata
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass

from kv_transfer.handoff import MAX_GROUPS
from kv_transfer.transport import KvArea

_MAGIC = b"dptnixl2"
_HEADER = struct.Struct("<8s16s3QiI")
_AREA = struct.Struct("<3Q")
_MAX_METADATA_BYTES = 1 << 20
_MAX_ITEMS = 1 << 24  # a descriptor is made of each: without a bound, 80 bytes from a socket fill the memory


@dataclass(frozen=True, slots=True)
class NixlEndpoint:
    """`device` is -1 for host memory, else the CUDA device. `scratch` receives generations written by a source."""

    host: bytes
    areas: tuple[KvArea, ...]
    generations_address: int
    scratch_address: int
    scratch_slots: int
    device: int
    metadata: bytes

    def pack(self) -> bytes:
        header = _HEADER.pack(
            _MAGIC,
            self.host,
            self.generations_address,
            self.scratch_address,
            self.scratch_slots,
            self.device,
            len(self.areas),
        )
        areas = b"".join(_AREA.pack(area.base_address, area.block_bytes, area.num_blocks) for area in self.areas)
        return header + areas + self.metadata

    @classmethod
    def unpack(cls, data: bytes) -> NixlEndpoint:
        """Raises ValueError, naming what is wrong."""
        if len(data) < _HEADER.size or len(data) > _HEADER.size + MAX_GROUPS * _AREA.size + _MAX_METADATA_BYTES:
            raise ValueError(f"an endpoint of {len(data)} bytes cannot be one")
        magic, host, generations, scratch, slots, device, num_areas = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError(f"the endpoint begins with {magic!r}, expected {_MAGIC!r}: another version of Diptych?")
        if not 0 < num_areas <= MAX_GROUPS:
            raise ValueError(f"the endpoint names {num_areas} areas of KV, expected are 1 to {MAX_GROUPS}")
        end = _HEADER.size + num_areas * _AREA.size
        if len(data) < end or len(data) > end + _MAX_METADATA_BYTES:
            raise ValueError(f"an endpoint of {len(data)} bytes and {num_areas} areas cannot be one")
        areas = tuple(KvArea(*_AREA.unpack_from(data, at)) for at in range(_HEADER.size, end, _AREA.size))
        endpoint = cls(host, areas, generations, scratch, slots, device, data[end:])
        num_blocks = sum(area.num_blocks for area in areas)
        if max(num_blocks, slots) > _MAX_ITEMS:
            raise ValueError(f"the endpoint names {max(num_blocks, slots)} items, the limit is {_MAX_ITEMS}")
        for name, memory in (
            *(("KV pool", area) for area in areas),
            ("generations", KvArea(generations, 8, num_blocks)),
            ("scratch", KvArea(scratch, 8, slots)),
        ):
            if not memory.base_address or not memory.num_blocks or not memory.block_bytes:
                raise ValueError(f"the endpoint's {name} is empty")
            if memory.base_address + memory.num_blocks * memory.block_bytes >= 1 << 64:
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
