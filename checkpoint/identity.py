"""Which weights these are: a digest over every byte of them, and of config.json.

1. Each weight file is hashed whole, in pieces, by a few threads (xxh3-128: against accidents, not against forgers).
2. Its digest is kept in the cache directory under path, size, modification and change time: copying with the old
   times changes the change time. The next start reads it there, and so does the next worker on this machine: one
   hashes while the others wait.
3. A cache that cannot be written costs time and nothing else.

benchmarks/identity.py says how long it takes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from settings.cache import cache_directory

_PIECE_BYTES = 32 << 20
_READ_BYTES = 1 << 20
_THREADS = 8
_UNSTABLE = ("transformers_version", "_name_or_path")  # of config.json: what says nothing of the model


def model_identity(config: Mapping[str, Any], files: Sequence[Path]) -> str:
    """32 hexadecimal digits; equal for equal checkpoints. `config`: config.json as it stands. Raises OSError."""
    h = hashlib.sha256()
    described = {k: v for k, v in config.items() if k not in _UNSTABLE}
    h.update(json.dumps(described, sort_keys=True).encode())
    for file in files:
        h.update(f"{file.name}:{file_digest(file)}".encode())
    return h.hexdigest()[:32]


def file_digest(file: Path) -> str:
    """Of all its bytes; from the cache where the file has not changed since. Raises OSError."""
    stat = file.stat()
    key = f"{os.path.realpath(file)}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    kept = cache_directory() / "identities" / hashlib.sha256(key.encode()).hexdigest()[:32]
    known = _kept(kept)
    if known:
        return known
    with _lock(kept):
        known = _kept(kept)
        if not known:
            known = _hashed(file, stat.st_size)
            _keep(kept, known)
    return known


def _hashed(file: Path, size: int) -> str:
    """The same whatever the number of threads: a hash of the pieces' hashes."""
    import xxhash  # not needed by who loads nothing

    starts = range(0, size, _PIECE_BYTES)
    threads = max(1, min(_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))
    descriptor = os.open(file, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="identity") as pool:
            pieces = list(pool.map(lambda start: _piece(descriptor, start), starts))
    finally:
        os.close(descriptor)
    return xxhash.xxh3_128_hexdigest(b"".join(pieces) + size.to_bytes(8, "little"))


def _piece(descriptor: int, start: int) -> bytes:
    import xxhash

    h, at, end = xxhash.xxh3_128(), start, start + _PIECE_BYTES
    buffer = bytearray(_READ_BYTES)
    while at < end:
        count = os.preadv(descriptor, [memoryview(buffer)[: min(_READ_BYTES, end - at)]], at)
        if not count:
            break
        h.update(memoryview(buffer)[:count])
        at += count
    return h.digest()


def _kept(path: Path) -> str:
    try:
        text = path.read_text()
    except (OSError, ValueError):
        return ""
    return text if len(text) == 32 and set(text) <= set("0123456789abcdef") else ""


def _keep(path: Path, digest: str) -> None:
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(digest)
        os.replace(file.name, path)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process hashes a file at a time; where no lock can be had, everybody does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
