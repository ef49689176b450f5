"""Who calls, and what that caller may ask for. Between every door of the router and the dispatcher.

door: `gate.authenticate(header)` -> Caller ──> CALLER (a context variable of the call)
dispatcher: `gate.enter(caller, ...)` -> Pass ──tokens counted──> `take_tokens` ──request ends──> `leave`, exactly once

Without a key file everybody is the anonymous caller with no limits and no tenant. With one, a call without a caller
is refused: a door that forgot to ask lets nobody in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from router.access.keys import KeyEntry, KeyTable, Unknown, read_keys
from router.access.rate_limit import OverLimit, RateLimits, TokensLeft
from router.errors import Code, Failure, RequestRefused, refuse
from settings.file import SettingsError
from settings.private import readable_by_others

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_MAX_KEY_CHARS = 200


@dataclass(frozen=True, slots=True)
class Caller:
    """`key` None: authentication is off."""

    key: KeyEntry | None = None

    @property
    def tenant(self) -> str:
        return self.key.tenant if self.key is not None else ""

    @property
    def admin(self) -> bool:
        return self.key is None or self.key.admin


ANYBODY = Caller()
CALLER: ContextVar[Caller | None] = ContextVar("diptych_caller", default=None)


class Pass:
    """One request's way through its key's limits. `leave` may be called more than once."""

    __slots__ = ("_gate", "_key_id", "_left", "_reserved", "tenant")

    def __init__(self, gate: Gate, caller: Caller) -> None:
        self._gate = gate
        self._key_id = caller.key.id if caller.key is not None else ""
        self._reserved = 0
        self._left = caller.key is None
        self.tenant = caller.tenant

    def tokens_left(self, now: float) -> TokensLeft | None:
        """None: no limit."""
        return self._gate.limits.tokens_left(self._key_id, now) if self._key_id else None

    def take_tokens(self, tokens: int, now: float) -> None:
        """Raises RequestRefused."""
        if not self._key_id:
            return
        over = self._gate.limits.take_tokens(self._key_id, tokens, now)
        if over is not None:
            raise _over(over)
        self._reserved = tokens

    def leave(self, used_tokens: int, now: float) -> None:
        if not self._left:
            self._left = True
            self._gate.limits.end(self._key_id, max(0, self._reserved - used_tokens), now)


class Gate:
    """`keys` None: authentication is off."""

    def __init__(self, keys: KeyTable | None = None, wall_clock: Callable[[], float] = time.time) -> None:
        self.keys = keys
        self.limits = RateLimits()
        self._wall_clock = wall_clock
        self.routers: Callable[[], int] = lambda: 1  # that share the keys' limits
        self.refused_total = 0  # calls without a good key

    # Doors.

    def authenticate_one(self, headers: Sequence[str | bytes]) -> Caller:
        """All of a call's `authorization` headers: with two, whoever stands before us may have looked at the other."""
        if self.keys is not None and len(headers) > 1:
            raise self._unauthenticated(f"{len(headers)} headers `authorization` were sent; send one")
        given = headers[0] if headers else None
        return self.authenticate(given.decode("latin-1") if isinstance(given, bytes) else given)

    def authenticate(self, authorization: str | None) -> Caller:
        """`authorization`: the header, "Bearer KEY". Raises RequestRefused."""
        if self.keys is None:
            return ANYBODY
        scheme, _, presented = (authorization or "").strip().partition(" ")
        presented = presented.strip()
        if scheme.lower() != "bearer" or not presented or len(presented) > _MAX_KEY_CHARS:
            raise self._unauthenticated("no API key was sent; send the header `authorization: Bearer KEY`")
        found = self.keys.find(presented, self._wall_clock())
        if isinstance(found, Unknown):
            raise self._unauthenticated(found.why)
        return Caller(found)

    def _unauthenticated(self, why: str) -> RequestRefused:
        self.refused_total += 1
        return RequestRefused(Failure(Code.UNAUTHENTICATED, why))

    def current(self) -> Caller:
        """Who called the code that runs now, as they stand now: a key may have been revoked in mid-session."""
        if self.keys is None:
            return ANYBODY
        caller = CALLER.get()
        if caller is None or caller.key is None:
            raise self._unauthenticated("no API key was sent; send the header `authorization: Bearer KEY`")
        now_known = self.keys.still(caller.key, self._wall_clock())
        if isinstance(now_known, Unknown):
            raise self._unauthenticated(now_known.why)
        return caller if now_known is caller.key else Caller(now_known)

    def require_admin(self) -> None:
        """Raises RequestRefused."""
        if not self.current().admin:
            raise refuse(
                Code.PERMISSION_DENIED,
                "this is about everybody's requests and needs an admin key (`diptych keys add --admin`)",
            )

    # Requests.

    def may_use(self, caller: Caller, names: Sequence[str]) -> bool:
        """A model, by any of its names: they are one model."""
        return caller.key is None or not caller.key.models or any(name in caller.key.models for name in names)

    def priority(self, caller: Caller, asked: int) -> int:
        """What was asked for, 0 if nothing, within what the key may have. Raises RequestRefused."""
        if caller.key is None or asked <= caller.key.max_priority:
            return asked
        if asked <= 0:
            return caller.key.max_priority
        raise refuse(
            Code.PERMISSION_DENIED,
            f"priority is {asked} and this key may ask for {caller.key.max_priority} at most; lower it",
            field="priority",
        )

    def enter(self, caller: Caller, names: Sequence[str], now: float, *, again: bool = False) -> Pass:
        """A request for the model of these names begins, or a further answer to one. Raises RequestRefused; else the
        pass is to be left.
        """
        if not self.may_use(caller, names):
            why = f"this key may not use the model {names[0]!r}; ask for one that may"
            raise refuse(Code.PERMISSION_DENIED, why, field="model")
        if caller.key is not None:
            allowance = caller.key.allowance().shared_by(self.routers())
            over = self.limits.begin(caller.key.id, allowance, now, again=again)
            if over is not None:
                raise _over(over)
        return Pass(self, caller)


def _over(over: OverLimit) -> RequestRefused:
    fix = f"retry in {over.retry_after_s:.1f} s" if over.retry_after_s else "retrying as it is will not help"
    return refuse(Code.RESOURCE_EXHAUSTED, f"{over.what}; {fix}", retry_after_ms=_ms(over.retry_after_s))


def _ms(seconds: float) -> int:
    return int(-(-seconds * 1e3 // 1))


def scoped_salt(tenant: str, salt: str) -> str:
    """What names a tenant's blocks: no two pairs give the same, so that no client's salt is another tenant's."""
    if not tenant:
        return f"-{salt}" if salt else ""
    return f"+{len(tenant)}:{tenant}{salt}"


def scoped_id(tenant: str, request_id: str) -> str:
    """As Request.key: two tenants may use the same id and never meet."""
    return f"{tenant}\n{request_id}" if tenant else request_id


class KeyFileWatch:
    """Puts the key file's content into a gate whenever it changes; looks twice a second.

    A file that cannot be used, and one without the word `keys`, leaves the last good keys in place and is complained
    of. It is read when it has not changed between two looks: not everybody who writes a file replaces it whole.
    """

    def __init__(self, path: str, gate: Gate) -> None:
        """Raises SettingsError."""
        self._path = path
        self._gate = gate
        self._seen = self._before = self._stamp()
        found = read_keys(path).keys
        if not found:
            raise SettingsError(f"{path}: names no key, so that nobody could come in")
        gate.keys = KeyTable(found)
        self._warn_of_readers()

    def _warn_of_readers(self) -> None:
        if problem := readable_by_others(self._path):
            log.warning("security.api_keys: %s. It holds no keys, but shows tenants, limits and permissions", problem)

    def _stamp(self) -> object:
        try:
            s = os.stat(self._path)
        except OSError:
            return None
        return (s.st_mtime_ns, s.st_size, s.st_ino)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await self.look()

    async def look(self) -> None:
        stamp = self._stamp()
        settled, self._before = stamp == self._before, stamp
        if stamp == self._seen or not settled:
            return
        self._seen = stamp
        try:
            found = (await asyncio.to_thread(read_keys, self._path)).keys
        except SettingsError as error:
            log.error("API keys: %s. The keys read before stay in force", error)
        except Exception:  # a bug here must not end the watch: a revoked key would live on
            log.exception("API keys: the file was not read. The keys read before stay in force")
        else:
            self._gate.keys = KeyTable(found)
            self._gate.limits.forget_all_but(self._gate.keys.by_id)
            self._warn_of_readers()
            log.log(logging.INFO if found else logging.WARNING, "API keys: %d", len(found))
