"""The ASGI application: routes, errors in OpenAI's shape, CORS. What a route does is in other files.

    app.route("GET", "/v1/models", handler)        exactly this path
    app.route("GET", "/v1/models/*", handler)      and everything below: exchange.tail has the rest

A handler gets an Exchange and answers it, or raises ApiError or RequestRefused.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic_core import from_json, to_json

from router.access.gate import CALLER, Gate
from router.access.sites import Sites
from router.admission import usable_id
from router.doors.elements import json_excess
from router.doors.http.connection import CYCLE, EXTENSION, Connection
from router.doors.http.encodings import ENCODINGS, as_utf8, decompress, encoding_of
from router.doors.http.errors import TOO_LARGE, ApiError, of_failure
from router.errors import RequestRefused, our_failure

log = logging.getLogger(__name__)

JSON = b"application/json"
MAX_ID_BYTES = 200
_SLASHES = re.compile("//+")
_OPEN_PATHS = frozenset({"/health", "/", "/favicon.ico"})
_PAGE_FILES = "/ui/"  # a browser sends no key for what it shows: the page's files are open, what they show is not
# Every tenant's figures; what is served.
_ADMIN_PATHS = frozenset({"/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
Headers = list[tuple[bytes, bytes]]


class ClientLeft(Exception):
    """Before its request had arrived."""


class Exchange:
    """One request and its response."""

    def __init__(self, scope: Any, receive: Any, send: Any, request_id: str) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self._raw_headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.headers: dict[bytes, bytes] = dict(self._raw_headers)  # names in lower case; of repeated ones the last
        self.connection: Connection = scope["extensions"][EXTENSION]
        self._cycle = scope["extensions"][CYCLE]
        self.request_id = request_id
        self.tail = ""  # of a path that matched a route with an asterisk: what stands for it
        self.started = False
        self.extra: Headers = [(b"x-request-id", request_id.encode())]
        self._receive = receive
        self._send = send

    def header(self, name: bytes) -> str:
        return self.headers.get(name, b"").decode("latin-1")

    def all(self, name: bytes) -> list[bytes]:
        """Of a header that should come once, as often as it came."""
        return [value for given, value in self._raw_headers if given == name]

    def name(self, request_id: str) -> None:
        """The client's own id, which it finds again in the response, in logs and in traces. Raises ApiError."""
        if not self.name_if_usable(request_id):
            raise ApiError(400, f"request_id is not printable ASCII of 1 to {MAX_ID_BYTES} bytes; use another")

    def name_if_usable(self, request_id: str) -> bool:
        """A header may be a proxy's, of which the client knows nothing: one that does not fit is as none."""
        if len(request_id) > MAX_ID_BYTES or not usable_id(request_id):
            return False
        self.request_id = request_id
        self.extra[0] = (b"x-request-id", request_id.encode())
        return True

    async def body(self, limit_bytes: int) -> bytes:
        """Refused before it is read where its length is named, and at the limit where it is not, compressed or not."""
        compressed = self.headers.get(b"content-encoding")
        if not compressed:
            return await self._read(limit_bytes)
        try:
            encoding = encoding_of(compressed)
        except ApiError:
            self.extra.append((b"accept-encoding", ", ".join(ENCODINGS).encode()))
            raise
        data = await self._read(limit_bytes)
        if not encoding:
            return data
        plain = await asyncio.to_thread(decompress, data, encoding, limit_bytes)
        if plain is None:
            raise _too_large(limit_bytes + 1, limit_bytes)
        return plain

    async def _read(self, limit_bytes: int) -> bytes:
        announced = self.headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit_bytes:
            raise _too_large(int(announced), limit_bytes)
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            parts.append(message["body"])
            size += len(message["body"])
            if size > limit_bytes:
                raise _too_large(size, limit_bytes)
            more = message["more_body"]
        return b"".join(parts)

    async def json_object(self, limit_bytes: int) -> dict[str, Any]:
        data = as_utf8(await self.body(limit_bytes), self.headers.get(b"content-type", b""))
        if excess := json_excess(data):
            raise ApiError(400, f"the body has {excess}; send less", code=TOO_LARGE)
        try:
            value = from_json(data, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
        if not isinstance(value, dict):
            raise ApiError(400, f"the body is a JSON {type(value).__name__}; send an object", code="invalid_json")
        return value

    async def respond(self, status: int, body: bytes, content_type: bytes = JSON, headers: Headers = []) -> None:  # noqa: B006
        await self.start(status, [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers])
        await self.send_last(body)

    async def respond_json(self, value: Any, status: int = 200) -> None:
        await self.respond(status, to_json(value))

    async def start(self, status: int, headers: Headers) -> None:
        """Without a content-length the body may follow in parts: `connection.write_chunk`, then `send_last`."""
        self.started = True
        known = any(name == b"content-length" for name, _ in headers)
        self.connection.answer_begins(self._cycle, of_known_length=known)
        await self._send({"type": "http.response.start", "status": status, "headers": headers + self.extra})

    async def send_last(self, body: bytes) -> None:
        self.connection.answer_ends(self._cycle, body)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


Handler = Callable[[Exchange], Awaitable[None]]


class App:
    def __init__(
        self, rng: random.Random, cors_origins: list[str], gate: Gate | None = None, sites: Sites | None = None
    ) -> None:
        """`sites`: where nobody is asked for a key; None: anybody's pages may send what they like."""
        self._rng = rng
        self._sites = sites
        self._gate = gate or Gate()
        self._cors = frozenset(origin.encode() for origin in cors_origins)
        self._routes: dict[str, dict[str, Handler]] = {}
        self._below: dict[str, dict[str, Handler]] = {}

    def route(self, method: str, path: str, handler: Handler) -> None:
        routes, path = (self._below, path[:-1]) if path.endswith("/*") else (self._routes, path)
        routes.setdefault(path, {})[method] = handler

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", "uvicorn runs without lifespan and websockets"
        exchange = Exchange(scope, receive, send, f"{self._rng.getrandbits(64):016x}")
        try:
            exchange.name_if_usable(exchange.header(b"x-request-id"))
            exchange.extra += self._cors_headers(exchange)
            handler = self._handler(exchange)
            self._let_in(exchange)
            await handler(exchange)
        except ClientLeft:
            return
        except ApiError as error:
            await self._answer(exchange, error)
        except RequestRefused as error:
            await self._answer(exchange, of_failure(error.failure))
        except Exception as error:
            log.exception("%s %s: the router failed", exchange.method, exchange.path)
            message = our_failure(error).message
            await self._answer(exchange, ApiError(500, message, code="internal_error"))

    def _let_in(self, exchange: Exchange) -> None:
        """Site and API key. Raises ApiError or RequestRefused."""
        path = exchange.path
        if self._sites is not None:
            why = self._sites.refusal(exchange.method, exchange.header(b"host"), exchange.header(b"origin"))
            if why:
                raise ApiError(403, why, code="forbidden_site")
        if path in _OPEN_PATHS or exchange.method == "OPTIONS":
            return
        of_page = path.startswith(_PAGE_FILES)
        if of_page and "." in path:  # a file has an ending, and what shows figures has none
            return
        CALLER.set(self._gate.authenticate_one(exchange.all(b"authorization")))  # each request has a task of its own
        if of_page or path in _ADMIN_PATHS:
            self._gate.require_admin()

    def _handler(self, exchange: Exchange) -> Handler:
        path = exchange.path
        methods = self._routes.get(path)
        if methods is None:
            if path == "*" and exchange.method == "OPTIONS":
                return self._options({"GET": _nothing, "POST": _nothing})
            # Slashes that base URLs are joined with, once too often: what follows sees the path that was meant.
            path = exchange.path = f"/{_SLASHES.sub('/', path).strip('/')}"
            methods = self._routes.get(path)
        if methods is None:
            for prefix, below in self._below.items():
                if path.startswith(prefix):
                    exchange.tail, methods = path[len(prefix) :], below
        if methods is None:
            known = ", ".join(sorted(self._routes))
            raise ApiError(404, f"{path[:200]} does not exist here; there are {known}", code="unknown_url")
        if exchange.method == "OPTIONS":
            return self._options(methods)
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            exchange.extra.append((b"allow", _allow(methods)))
            raise ApiError(
                405, f"{exchange.method} is not for {path[:200]}; use {' or '.join(methods)}", code="method_not_allowed"
            )
        return handler

    @staticmethod
    def _options(methods: dict[str, Handler]) -> Handler:
        async def options(exchange: Exchange) -> None:
            await exchange.start(204, [(b"allow", _allow(methods))])
            await exchange.send_last(b"")

        return options

    def _cors_headers(self, exchange: Exchange) -> Headers:
        origin = exchange.headers.get(b"origin")
        if origin is None or not self._cors or not (b"*" in self._cors or origin in self._cors):
            return []
        headers = [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
        if exchange.method == "OPTIONS":
            headers += [
                (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
                (b"access-control-allow-headers", b"*, authorization, content-type, x-request-id"),
                (b"access-control-max-age", b"600"),
            ]
        return headers

    @staticmethod
    async def _answer(exchange: Exchange, error: ApiError) -> None:
        if (
            exchange.started
        ):  # the status is sent already: all that can be said is that this is not the end it should be
            exchange.connection.close_soon(1.0)
            return
        await exchange.respond(error.status, error.body(), headers=error.headers())


async def _nothing(exchange: Exchange) -> None:
    await exchange.respond(204, b"")


def _allow(methods: dict[str, Handler]) -> bytes:
    return ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"]).encode()


def _too_large(size: int, limit: int) -> ApiError:
    return ApiError(413, f"the body has {size} bytes or more, the limit is {limit}; send a shorter prompt")
