"""The status and playground page at `/`: static files beside this package, and what they show as JSON.

The page asks for /ui/cluster every second, and for /ui/scaling every five. However many look, a message is written
out at most twice a second, and beside the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from router.doors.http.app import JSON, App, Exchange, Headers
from router.doors.http.errors import ApiError

FILES = Path(__file__).resolve().parent.parent / "ui"
_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css",
    ".js": b"text/javascript",
    ".svg": b"image/svg+xml",
}
_FRESH_S = 0.5
# Nothing from elsewhere, nothing inline: text of a model or a worker can never become code.
_HEADERS: Headers = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]


class _Shown:
    """A message as JSON, made anew when it is asked for and no longer fresh."""

    def __init__(self, message: Callable[[], Any], clock: Callable[[], float]) -> None:
        self._message = message
        self._clock = clock
        self._json = b""
        self._made_at: float | None = None
        self._making = asyncio.Lock()

    async def json(self) -> bytes:
        async with self._making:  # whoever comes meanwhile takes what is made now
            if self._made_at is None or self._clock() - self._made_at > _FRESH_S:
                self._json = await asyncio.to_thread(_to_json, self._message())
                self._made_at = self._clock()
        return self._json


class UiRoutes:
    """`cluster` and `scaling`: messages of ClusterService, made anew."""

    def __init__(
        self,
        cluster: Callable[[], Any],
        scaling: Callable[[], Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = _Shown(cluster, clock)
        self._scaling = _Shown(scaling, clock)
        self._files = {path.name: path.read_bytes() for path in FILES.iterdir() if path.suffix in _TYPES}

    def add_to(self, app: App) -> None:
        app.route("GET", "/", self.page)
        app.route("GET", "/favicon.ico", self.icon)
        app.route("GET", "/ui/cluster", self.show_cluster)
        app.route("GET", "/ui/scaling", self.show_scaling)
        app.route("GET", "/ui/*", self.file)

    async def page(self, exchange: Exchange) -> None:
        await self._respond(exchange, "index.html")

    async def icon(self, exchange: Exchange) -> None:
        await self._respond(exchange, "icon.svg")

    async def file(self, exchange: Exchange) -> None:
        if exchange.tail not in self._files:
            raise ApiError(404, f"/ui/{exchange.tail[:100]} does not exist; the page is at /", code="unknown_url")
        await self._respond(exchange, exchange.tail)

    async def show_cluster(self, exchange: Exchange) -> None:
        await exchange.respond(200, await self._cluster.json(), JSON, _HEADERS)

    async def show_scaling(self, exchange: Exchange) -> None:
        await exchange.respond(200, await self._scaling.json(), JSON, _HEADERS)

    async def _respond(self, exchange: Exchange, name: str) -> None:
        await exchange.respond(200, self._files[name], _TYPES[Path(name).suffix], _HEADERS)


def _to_json(message: Any) -> bytes:
    text = json_format.MessageToJson(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=None
    )
    return text.encode()
