"""Pages of a browser at a router that asks nobody for a key. Pure.

Such a router listens on loopback, and so does every browser of its host reach it: a page from anywhere can send it a
request blindly (its answer is not shown to the page, but the work is done), and a page whose name was made to point
at 127.0.0.1 (DNS rebinding) can read the answers as its own. The first shows in `Origin`, the second in `Host`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from settings.security import is_loopback

_READING = frozenset({"GET", "HEAD", "OPTIONS"})  # change nothing, and the browser keeps the answer from other sites


class Sites:
    def __init__(self, allowed_hosts: Sequence[str] = (), origins: Sequence[str] = ()) -> None:
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._origins = frozenset(origins)
        self._is_ours = lru_cache(256)(self._named_here)  # of few names the same again and again

    def refusal(self, method: str, host: str, origin: str) -> str:
        """Empty: a program, or a page of ours or of an allowed origin."""
        if host and not self._is_ours(host):
            return (
                f"the host {host[:100]!r} is not this router's, which asks for no key and so answers to loopback names "
                "only; add the name to router.http.allowed_hosts, or use API keys"
            )
        if not origin or method in _READING or "*" in self._origins or origin in self._origins:
            return ""
        if origin.partition("://")[2] == host:
            return ""  # our own page
        return f"a page of {origin[:100]!r} may not send requests here; add it to router.http.cors_origins"

    def _named_here(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return is_loopback(name) or name.endswith(".localhost") or name in self._hosts
