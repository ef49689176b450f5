"""On what this process accepts connections: found among its own open sockets, so that none can be forgotten.

Whoever opens one declares what it is; one that nobody declared is listed all the same, as unknown. (Linux;
elsewhere only what was declared is known.)
"""

from __future__ import annotations

import ipaddress
import os
import sys
import threading
import time
from dataclasses import dataclass

from settings.addresses import join

_LISTEN = "0A"
_LOOK_EVERY_S = 2.0


@dataclass(frozen=True, slots=True, order=True)
class Listener:
    """`authentication`: what a caller must show, in words; "none" if nothing."""

    address: str
    protocol: str
    authentication: str
    encrypted: bool


_lock = threading.Lock()
_declared: dict[int, tuple[str, str, bool]] = {}  # by port
_found: tuple[float, list[Listener]] = (-1e9, [])


def declare(port: int, protocol: str, authentication: str, *, encrypted: bool) -> None:
    global _found
    with _lock:
        _declared[port] = (protocol, authentication, encrypted)
        _found = (-1e9, [])


def listeners() -> list[Listener]:
    """Of this process. Looks every two seconds at most."""
    global _found
    with _lock:
        now = time.monotonic()
        if now - _found[0] > _LOOK_EVERY_S:
            unknown = ("unknown", "unknown", False)
            found = {Listener(join(h, port), *_declared.get(port, unknown)) for h, port in listening(os.getpid())}
            _found = (now, sorted(found))
        return _found[1]


def listening(pid: int) -> list[tuple[str, int]]:
    """(host, port) of the TCP sockets on which a process accepts connections."""
    if sys.platform != "linux":
        return [("?", port) for port in _declared]
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            link = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue  # closed meanwhile
        if link.startswith("socket:["):
            inodes.add(link[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{pid}/net/{table}") as file:
                lines = file.readlines()[1:]
        except OSError:
            continue  # no IPv6 here
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in inodes:
                found.append(_address(fields[1]))
    return found


def _address(text: str) -> tuple[str, int]:
    """As the kernel writes it: words of the address in the machine's byte order, in hexadecimal."""
    host, port = text.split(":")
    words = [bytes.fromhex(host[i : i + 8]) for i in range(0, len(host), 8)]
    data = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    address = ipaddress.ip_address(data)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped  # gRPC listens on IPv4 by IPv6 sockets
    return (f"[{address}]" if address.version == 6 else str(address)), int(port, 16)
