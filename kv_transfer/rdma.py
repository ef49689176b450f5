"""The RDMA ports that this process may use, and which address RoCE has on them, as the kernel shows them.

sys/class/infiniband/DEVICE/ports/N/state                   "4: ACTIVE"
                                   link_layer               "InfiniBand", or "Ethernet": RoCE
                                   gids/I, gid_attrs/types/I    addresses, and which RoCE each is of
sys/class/infiniband_verbs/uverbsK/ibdev                    DEVICE, which is opened as dev/infiniband/uverbsK

A container sees all devices of its host in /sys, and may open those that it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_IPV4 = "0000:0000:0000:0000:0000:ffff:"
_LINK_LOCAL = "fe80:"
_EMPTY = "0000:0000:0000:0000:0000:0000:0000:0000"


@dataclass(frozen=True, slots=True)
class RdmaPort:
    device: str
    number: int
    gid_index: int | None  # RoCE's; None: InfiniBand, which needs none

    def __str__(self) -> str:
        return f"{self.device}:{self.number}"


class NoRdma(Exception):
    """Names cause and fix."""


def usable_ports(root: Path = Path("/")) -> list[RdmaPort]:
    """Active ones of devices that may be opened. Raises NoRdma if there is none."""
    base = root / "sys/class/infiniband"
    devices = sorted(path.name for path in base.iterdir()) if base.is_dir() else []
    if not devices:
        raise NoRdma("no RDMA device is here: request the resource that the device plugin offers, or use TCP")
    may_open = {_read(path / "ibdev") for path in _given(root)}
    found = [port for device in devices if device in may_open for port in _active(base / device)]
    if not found:
        why = "has an active port" if may_open & set(devices) else "may be opened (/dev/infiniband)"
        raise NoRdma(f"none of the RDMA devices {', '.join(devices)} {why}: look at the link and the device plugin")
    return found


def ucx_variables(ports: list[RdmaPort]) -> dict[str, str]:
    """For UCX. It takes one GID index for all ports: where they differ, it is left to choose."""
    variables = {"UCX_NET_DEVICES": ",".join(map(str, ports))}
    indices = {port.gid_index for port in ports if port.gid_index is not None}
    if len(indices) == 1:
        variables["UCX_IB_GID_INDEX"] = str(indices.pop())
    return variables


def _given(root: Path) -> Iterator[Path]:
    verbs = root / "sys/class/infiniband_verbs"
    for path in sorted(verbs.iterdir()) if verbs.is_dir() else []:
        if (root / "dev/infiniband" / path.name).exists():
            yield path


def _active(device: Path) -> Iterator[RdmaPort]:
    for port in sorted((device / "ports").iterdir(), key=lambda path: int(path.name)):
        if not _read(port / "state").startswith("4"):
            continue
        if _read(port / "link_layer") != "Ethernet":
            yield RdmaPort(device.name, int(port.name), None)
        elif (index := _roce_index(port)) is not None:
            yield RdmaPort(device.name, int(port.name), index)


def _roce_index(port: Path) -> int | None:
    """RoCE v2 by an IPv4 address, which routers forward; else by another address that is no link's own."""
    kinds = sorted((port / "gid_attrs/types").iterdir(), key=lambda path: int(path.name))
    v2 = [int(path.name) for path in kinds if _read(path) == "RoCE v2"]
    gids = {index: _read(port / "gids" / str(index)) for index in v2}
    chosen = [index for index in v2 if gids[index] not in ("", _EMPTY)]
    for good in (
        [index for index in chosen if gids[index].startswith(_IPV4)],
        [index for index in chosen if not gids[index].startswith(_LINK_LOCAL)],
        chosen,
    ):
        if good:
            return good[0]
    return None


def _read(path: Path) -> str:
    """Empty where there is nothing: an unused entry of the GID table answers with an error."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
