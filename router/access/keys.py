"""API keys: what one may do, how one is made, and the file that they are kept in.

    keys:
      - {id: 4f0c..., sha256: 9b1d..., tenant: acme, requests_per_minute: 60, expires: 2027-01-01T00:00:00Z}

A key is `dpt_<id>_<secret>` with 256 random bits of secret, and the file holds its SHA-256. A slow hash (scrypt)
protects secrets that can be guessed; this one cannot, and a slow hash on every request would be a gift to whoever
floods a router. Pure, but for `read_keys` and `write_keys`.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from router.access.rate_limit import Allowance
from settings.file import SettingsError, read_settings, validate_settings

_PREFIX = "dpt"
_SECRET_BYTES = 32
_MAX_FILE_BYTES = 16 << 20


class KeyEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9]{4,32}$", description="Names the key in logs; no secret.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the whole key.")
    tenant: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Keys of one tenant share caches.")
    admin: bool = Field(default=False, description="May look at the cluster and at everybody's requests.")
    max_priority: int = Field(default=0, ge=-100, le=100, description="Highest priority that its requests may have.")
    requests_per_minute: int = Field(default=0, ge=0, description="0 = unlimited.")
    tokens_per_minute: int = Field(default=0, ge=0, description="Prompt and answer; 0 = unlimited.")
    max_concurrent: int = Field(default=0, ge=0, description="Requests at once; 0 = unlimited.")
    models: tuple[str, ...] = Field(default=(), description="Served names that it may use; empty = all.")
    expires: AwareDatetime | None = Field(default=None, description="From then on refused; null = never.")
    note: str = Field(default="", max_length=200)

    def allowance(self) -> Allowance:
        return Allowance(self.requests_per_minute, self.tokens_per_minute, self.max_concurrent)


class KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[KeyEntry, ...] = Field(description="`[]` locks everybody out; without it the file was cut short.")


def new_key(random_bytes: bytes) -> tuple[str, str, str]:
    """(the key, its id, its sha256) from 38 random bytes."""
    assert len(random_bytes) == 6 + _SECRET_BYTES
    key_id = random_bytes[:6].hex()
    secret = base64.urlsafe_b64encode(random_bytes[6:]).rstrip(b"=").decode()
    key = f"{_PREFIX}_{key_id}_{secret}"
    return key, key_id, digest(key)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Unknown:
    """Why a key is not taken. The words tell a stranger nothing that it did not know."""

    why: str


class KeyTable:
    def __init__(self, entries: Sequence[KeyEntry]) -> None:
        self.by_id = {entry.id: entry for entry in entries}

    def find(self, presented: str, wall_now: float) -> KeyEntry | Unknown:
        """The id is looked up, the rest is compared in constant time."""
        parts = presented.split("_", 2)
        entry = self.by_id.get(parts[1]) if len(parts) == 3 and parts[0] == _PREFIX else None
        expected = entry.sha256 if entry is not None else digest("nobody's key")
        same = hmac.compare_digest(digest(presented), expected)
        if entry is None or not same:
            return Unknown("the API key is not known here; check it, or ask for a new one")
        return self._unexpired(entry, wall_now)

    def still(self, known: KeyEntry, wall_now: float) -> KeyEntry | Unknown:
        """What is said of a key now that was found earlier."""
        entry = self.by_id.get(known.id)
        if entry is None or entry.sha256 != known.sha256:
            return Unknown("the API key was revoked; ask for a new one")
        return self._unexpired(entry, wall_now)

    @staticmethod
    def _unexpired(entry: KeyEntry, wall_now: float) -> KeyEntry | Unknown:
        if entry.expires is not None and entry.expires.timestamp() <= wall_now:
            return Unknown(f"the API key expired on {entry.expires:%Y-%m-%d %H:%M} UTC; ask for a new one")
        return entry


# The file. YAML for people; JSON for many thousands of keys, which YAML's parser would take minutes for.


def read_keys(path: str | Path) -> KeyFile:
    """Raises SettingsError."""
    if str(path).endswith(".json"):
        try:
            with open(path, "rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
            if len(data) > _MAX_FILE_BYTES:
                raise SettingsError(f"{path}: longer than {_MAX_FILE_BYTES} bytes; revoke keys that are not used")
            content: Any = json.loads(data)
        except (OSError, ValueError, RecursionError) as error:
            raise SettingsError(f"{path}: cannot be read: {error}; name a file of `diptych keys`") from None
        found = validate_settings(content, KeyFile, str(path))
    else:
        found = read_settings(path, KeyFile)
    ids = [entry.id for entry in found.keys]
    twice = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise SettingsError(f"{path}: the id {twice[0]} is given twice; every key has one of its own")
    return found


def write_keys(path: Path, content: KeyFile) -> None:
    """Whole or not at all, readable by its owner only. Raises OSError."""
    entries = [e.model_dump(mode="json", exclude_defaults=True) for e in content.keys]
    text = json.dumps({"keys": entries}, indent=1) if path.suffix == ".json" else yaml.safe_dump({"keys": entries})
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def expiry(text: str, now: datetime.datetime) -> datetime.datetime:
    """`90d`, `12h`, or an ISO date. Raises ValueError."""
    units = {"d": "days", "h": "hours", "m": "minutes"}
    if text[-1:] in units and text[:-1].isdigit():
        return (now + datetime.timedelta(**{units[text[-1]]: int(text[:-1])})).replace(microsecond=0)
    when = datetime.datetime.fromisoformat(text)
    return when if when.tzinfo is not None else when.replace(tzinfo=datetime.UTC)
