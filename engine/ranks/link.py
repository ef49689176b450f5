"""Between the leader and one other rank: frames over a pair of sockets. Each is [kind, length] and so many bytes.

leader                      rank
HELLO: configuration  ->
                      <-    HERE
             (both load the model, and compute together)
                      <-    READY, or REFUSED with the cause
STEP: a forward pass  ->
                      <-    FAILED: step, calls, cause      only when it fails
the sockets close     ->    the process ends
"""

from __future__ import annotations

import enum
import socket
import struct

_HEAD = struct.Struct("=II")
LONGEST = 1 << 28


class Kind(enum.IntEnum):
    HELLO = 1
    HERE = 2
    READY = 3
    REFUSED = 4
    STEP = 5
    FAILED = 6


FAILURE = struct.Struct("=qq")  # step, calls; the cause follows


def send(link: socket.socket, kind: Kind, content: bytes = b"") -> None:
    link.sendall(_HEAD.pack(kind, len(content)) + content)


def receive(link: socket.socket) -> tuple[Kind, bytes] | None:
    """None: the other side is gone."""
    head = _exactly(link, _HEAD.size)
    if head is None:
        return None
    kind, length = _HEAD.unpack(head)
    if length > LONGEST:
        raise ValueError(f"a frame of {length} bytes")
    content = _exactly(link, length)
    return None if content is None else (Kind(kind), content)


def _exactly(link: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = link.recv(size - len(parts))
        except ConnectionError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)
