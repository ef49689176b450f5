"""The cluster secret: one file that routers and workers share. It signs handoff tickets and proves membership.

HMAC-SHA256 with keys derived per purpose. The first line signs; every line verifies, so that a secret is changed by
adding the new one below, then moving it to the top, then deleting the old one, each step everywhere before the next.
Nothing here prints: `repr` of a secret says only how many lines it has.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import struct
import time

from settings.private import warn_of_readers

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_MIN_CHARS = 32
_MAX_BYTES = 4096
_PROOF_S = 120.0
PROOF_METADATA = "diptych-proof"


class SecretError(Exception):
    """Names file, cause and fix; never the content."""


def read_secrets(path: str) -> tuple[bytes, ...]:
    """Raises SecretError."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise SecretError(f"security.cluster_secret {path}: {error.strerror}; make one with `diptych certs`") from None
    lines = tuple(line.strip() for line in data.splitlines() if line.strip())
    if not lines or len(data) > _MAX_BYTES or any(len(line) < _MIN_CHARS for line in lines):
        raise SecretError(
            f"security.cluster_secret {path}: needs lines of at least {_MIN_CHARS} characters, at most {_MAX_BYTES} "
            "bytes in all; make one with `diptych certs`"
        )
    return lines


class ClusterSecret:
    """Follows its file. A file that became unreadable leaves the last good content in use; `problem` says so."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lines = read_secrets(path)
        warn_of_readers(path, "security.cluster_secret")
        self._seen = _stamp(path)
        self._looked = time.monotonic()
        self._derived: dict[bytes, tuple[bytes, ...]] = {}
        self.problem = ""

    def __repr__(self) -> str:
        return f"ClusterSecret({len(self._lines)} lines)"

    def _keys(self, purpose: bytes) -> tuple[bytes, ...]:
        now = time.monotonic()
        if now - self._looked > _LOOK_EVERY_S:
            self._looked = now
            self._look()
        keys = self._derived.get(purpose)
        if keys is None:
            keys = tuple(hmac.digest(line, b"diptych/" + purpose, "sha256") for line in self._lines)
            self._derived[purpose] = keys
        return keys

    def _look(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._lines = read_secrets(self._path)
        except SecretError as error:
            self.problem = str(error)
            log.error("%s. The previous secrets stay in use", self.problem)
            return
        self.problem = ""
        self._derived.clear()

    def sign(self, purpose: bytes, message: bytes) -> bytes:
        """32 bytes."""
        return hmac.digest(self._keys(purpose)[0], message, "sha256")

    def verify(self, purpose: bytes, message: bytes, mac: bytes) -> bool:
        return any(hmac.compare_digest(hmac.digest(key, message, "sha256"), mac) for key in self._keys(purpose))

    # Membership, for clusters without mutual TLS and as a second lock with it.

    def proof(self, role: str, wall_now: float) -> str:
        """What a member shows when it opens a call. Not bound to a connection: without TLS it can be overheard."""
        until = int(wall_now + _PROOF_S)
        return f"{role}.{until}.{self.sign(b'member', _member(role, until)).hex()}"

    def check_proof(self, proof: str, roles: tuple[str, ...], wall_now: float) -> str:
        """Empty if it holds; else why not."""
        parts = proof.split(".")
        if len(parts) != 3 or not parts[1].isascii() or not parts[1].isdigit() or len(parts[1]) > 12:
            return "no proof of membership: both sides need the same security.cluster_secret"
        role, until = parts[0], int(parts[1])
        try:
            mac = bytes.fromhex(parts[2])
        except ValueError:
            mac = b""
        if role not in roles:
            return f"a {' or '.join(roles)} was expected"
        if not self.verify(b"member", _member(role, until), mac):
            return "the proof of membership is wrong: both sides need the same security.cluster_secret"
        if until > wall_now + 2 * _PROOF_S:  # of a clock that is far ahead, or made to hold for ever
            return "the proof of membership is dated in the future: the clocks of the two hosts differ by minutes"
        if until < wall_now:
            return "the proof of membership has expired: the clocks of the two hosts differ by minutes"
        return ""


def _member(role: str, until: int) -> bytes:
    return hashlib.sha256(role.encode()).digest() + struct.pack("<Q", until)


def _stamp(path: str) -> tuple[int, int, int]:
    try:
        s = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (s.st_mtime_ns, s.st_size, s.st_ino)
