"""Host and port: joined, split, bound, and why binding failed. Nobody else puts a colon between the two.

host   as in settings: "127.0.0.1", "::1" (brackets are taken as well), "0.0.0.0", a name
address   what is dialled and shown: "127.0.0.1:8100", "[::1]:8100"
"""

from __future__ import annotations

import errno
import socket

_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # and what reaches it from this machine


def bare(host: str) -> str:
    """Without brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def join(host: str, port: int) -> str:
    host = bare(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    """The host of what `join` made."""
    return bare(address.rpartition(":")[0])


def apart(address: str) -> tuple[str, int]:
    """Host and port, of what somebody wrote. Raises ValueError, naming what is expected."""
    host, _, port = address.rpartition(":")
    if not bare(host) or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is no address; use NAME:PORT, with a port from 1 to 65535")
    return bare(host), int(port)


def is_everywhere(host: str) -> bool:
    """Listens on all interfaces: nothing that could be dialled."""
    return bare(host) in _EVERYWHERE


def from_here(host: str) -> str:
    """Where a listener on `host` is reached from this machine."""
    return _EVERYWHERE.get(bare(host), bare(host))


def listening_socket(host: str, port: int, backlog: int | None = None) -> socket.socket:
    """Bound, and listening if `backlog` is given. Of a name's addresses IPv4 is preferred. Raises OSError."""
    # A port that the system chooses is 0; a service's name, an empty one included, is none of ours.
    found = socket.getaddrinfo(bare(host) or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = min(found, key=lambda f: f[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        if backlog is not None:
            listener.listen(backlog)  # binding alone leaves a port that another may listen on
    except OSError:
        listener.close()
        raise
    return listener


def cannot_listen(host: str, port: int, host_key: str, port_key: str, error: OSError | None = None) -> str:
    """One sentence with cause and fix. `error`: what binding said; None: it is tried once more to see."""
    if error is None:
        try:
            listening_socket(host, port, 1).close()
        except OSError as found:
            error = found
    said = f"cannot listen on {join(host, port)}: {(error and error.strerror) or 'the reason is not known'}"
    another_port = f"set {port_key} to another port"
    if isinstance(error, socket.gaierror):
        return f"{said}; set {host_key} to an address of this machine, or to a name that it knows"
    match error.errno if error else None:
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT | errno.EINVAL:
            return f"{said}; set {host_key} to an address that this machine has"
        case errno.EACCES | errno.EPERM:
            return f"{said}; this user may not, {another_port} (1024 or higher)"
        case errno.EMFILE | errno.ENFILE:
            return f"{said}; raise the limit of open files (ulimit -n)"
        case _:
            return f"{said}; free it, or {another_port}"
