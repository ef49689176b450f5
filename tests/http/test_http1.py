"""HTTP/1.1's corners, on real sockets: what a client may send, and what it gets. uvicorn leaves much to others."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import random
import re
import zlib
from collections.abc import AsyncIterator

import pytest

from router.config import HttpConfig
from router.doors.http.app import App, Exchange
from router.doors.http.server import HttpServer, bind

LIMIT = 1 << 16


@contextlib.asynccontextmanager
async def serving(read_timeout_s: float) -> AsyncIterator[HttpServer]:
    app = App(random.Random(1), [])

    async def echo(exchange: Exchange) -> None:
        body = await exchange.body(LIMIT)
        said = f"{exchange.method} {exchange.path} {exchange.query.decode()} {len(body)} {body[:20].decode()}"
        await exchange.respond(200, said.encode(), b"text/plain")

    async def say(exchange: Exchange) -> None:
        await exchange.respond_json(await exchange.json_object(LIMIT))

    async def stream(exchange: Exchange) -> None:
        await exchange.start(200, [(b"content-type", b"text/event-stream")])
        exchange.connection.write_chunk(b"data: 1\n\n")
        await exchange.send_last(b"data: 2\n\n")

    app.route("GET", "/echo", echo)
    app.route("POST", "/echo", echo)
    app.route("POST", "/json", say)
    app.route("POST", "/stream", stream)
    app.route("GET", "/v1/models", echo)
    app.route("GET", "/v1/models/*", echo)
    app.route("GET", "/", echo)
    server = HttpServer(app, HttpConfig(read_timeout_s=read_timeout_s), bind("127.0.0.1", 0))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
async def server() -> AsyncIterator[HttpServer]:
    async with serving(30.0) as server:
        yield server


LAST = b"GET /echo?last HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


async def said(server: HttpServer, *parts: bytes) -> bytes:
    """Everything until the server closes. Parts come in packets of their own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.005 if len(parts) > 1 else 0)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


def split(data: bytes, *, bodies: bool = True) -> list[tuple[int, bytes]]:
    """Status and body of each response, by content-length."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        size = int(length.group(1)) if length is not None and bodies else 0
        found.append((int(head.split()[1]), data[:size]))
        data = data[size:]
    return found


async def answers(server: HttpServer, *parts: bytes) -> list[tuple[int, bytes]]:
    return split(await said(server, *parts))


def post(*headers: bytes, target: bytes = b"/echo", version: bytes = b"1.1", body: bytes = b"hello") -> bytes:
    lines = [b"POST %b HTTP/%b" % (target, version), b"host: a", *headers]
    if not any(h.lower().startswith((b"content-length", b"transfer-encoding")) for h in headers):
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])


H2C = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__")
CHUNKED = b"5\r\nhello\r\n0\r\n\r\n"
HELLO = (200, b"POST /echo  5 hello")
GOODBYE = (200, b"GET /echo last 0 ")


@pytest.mark.parametrize(
    "request_bytes",
    [
        post(),
        post(*H2C),
        post(*H2C, b"transfer-encoding: chunked", body=CHUNKED),
        post(b"connection: upgrade", b"upgrade: websocket"),
        post(b"connection: upgrade", b"upgrade: TLS/1.3, h2c"),
        post(b"upgrade: h2c"),
        post(target=b"/echo/"),
        post(target=b"//echo"),
        post(target=b"///echo//"),
        post(target=b"/%65cho"),
        post(target=b"http://a:80/echo"),
        post(target=b"/echo#part"),
        post(b"expect: something-else"),
        post(b"x-empty:", b"x-blank:  ", b"authorization:"),
        post(b"transfer-encoding: chunked", body=b'5;a=b;c="d"\r\nhello\r\n0;x\r\n\r\n'),
        post(b"transfer-encoding: Chunked", body=b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
        post(b"content-encoding: gzip", body=gzip.compress(b"hello", mtime=0)),
        post(b"content-encoding: X-GZIP", body=gzip.compress(b"hel", mtime=0) + gzip.compress(b"lo", mtime=0)),
        post(b"content-encoding: deflate", body=zlib.compress(b"hello")),
        post(b"content-encoding: deflate", body=zlib.compress(b"hello")[2:-4]),
        post(b"content-encoding: identity"),
        post(b"content-encoding:"),
        post(b"connection: keep-alive", b"keep-alive: timeout=5"),
        b"\r\n\r\n" + post(),
    ],
)
async def test_what_is_served_and_the_connection_goes_on(server: HttpServer, request_bytes: bytes) -> None:
    assert await answers(server, request_bytes + LAST) == [HELLO, GOODBYE]
    assert await answers(server, *(request_bytes[i : i + 7] for i in range(0, len(request_bytes), 7)), LAST) == [
        HELLO,
        GOODBYE,
    ]


@pytest.mark.parametrize(
    ("request_bytes", "status", "words"),
    [
        (b"post /echo HTTP/1.1\r\nhost: a\r\n\r\n", 400, b"malformed"),  # methods are in capitals
        (b"FOO /echo HTTP/1.1\r\nhost: a\r\n\r\n", 400, b"malformed"),
        (post(b"x-folded: a\r\n b"), 400, b"malformed"),
        (post(b"x-nul: a\0b"), 400, b"malformed"),
        (post(b"x-blank : a"), 400, b"malformed"),
        (post(b"content-length: 5", b"transfer-encoding: chunked", body=CHUNKED), 400, b"malformed"),
        (post(b"content-length: 5", b"content-length: 5"), 400, b"malformed"),
        (post(b"content-length: 5", b"content-length: 6"), 400, b"malformed"),
        (post(b"content-length: 5, 5"), 400, b"malformed"),
        (post(b"content-length: +5"), 400, b"malformed"),
        (post(b"content-length: 99999999999999999999999"), 400, b"malformed"),
        (post(b"transfer-encoding: gzip, chunked", body=CHUNKED), 501, b"only transfer-encoding"),
        (post(b"host: b"), 400, b"2 host headers"),
        (b"GET /echo HTTP/1.1\r\n\r\n", 400, b"0 host headers"),
        (b"GET /echo HTTP/1.2\r\nhost: a\r\n\r\n", 400, b"not HTTP/1.1"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, b"not HTTP/1.1"),
        (b"GET /\xc3\xbc HTTP/1.1\r\nhost: a\r\n\r\n", 400, b"malformed"),
        (b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n", 400, b"malformed"),
        (b"GET /echo\r\n\r\n", 400, b"HTTP/0.9; speak HTTP/1.1"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, b"not HTTP/1.1"),  # TLS
    ],
)
async def test_what_is_refused_ends_the_connection(
    server: HttpServer, request_bytes: bytes, status: int, words: bytes
) -> None:
    ((found, body),) = await answers(server, request_bytes)
    assert (found, words in body) == (status, True), body
    assert await answers(server, post() + request_bytes + LAST) in ([HELLO], [HELLO, (found, body)])
    assert (await answers(server, post(), request_bytes, LAST))[0] == HELLO, "the answer to another request"


@pytest.mark.parametrize(
    ("request_bytes", "status", "words"),
    [
        (post(b"content-encoding: br"), 415, b"gzip or deflate"),
        (
            post(b"content-encoding: gzip, gzip", body=gzip.compress(gzip.compress(b"hello", mtime=0), mtime=0)),
            415,
            b"gzip or deflate",
        ),
        (post(b"content-encoding: gzip"), 400, b"not gzip"),
        (post(b"content-encoding: gzip", body=gzip.compress(b"hello", mtime=0)[:-9]), 400, b"ends too early"),
        (post(b"content-encoding: deflate", body=zlib.compress(b"hello") + b"x"), 400, b"not deflate"),
        (post(b"content-encoding: gzip", body=gzip.compress(b"x" * (LIMIT + 1), mtime=0)), 413, b"65537 bytes or more"),
        (post(b"content-encoding: gzip", body=gzip.compress(b"\0" * (32 << 20), mtime=0)), 413, b"65537 bytes or more"),
        (post(target=b"/nothing"), 404, b"does not exist"),
        (post(target=b"/%ff%zz%00"), 404, b"does not exist"),
        (b"PATCH /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello", 405, b"use GET or POST"),
        (post(target=b"/json", body=b'{"a": "\xe9"}'), 400, b"not JSON"),
        (post(b"content-type: application/json; charset=klingon", target=b"/json"), 415, b"send UTF-8"),
        (post(b"content-type: application/json; charset=idna", target=b"/json"), 415, b"send UTF-8"),
        (post(b"content-type: application/json; charset=utf-16", target=b"/json"), 400, b"charset of its content-type"),
    ],
)
async def test_what_is_refused_and_the_connection_goes_on(
    server: HttpServer, request_bytes: bytes, status: int, words: bytes
) -> None:
    (found, body), last = await answers(server, request_bytes + LAST)
    assert (found, words in body, last) == (status, True, GOODBYE), body


@pytest.mark.parametrize(
    ("content_type", "charset"),
    [
        ("application/json", "utf-8"),
        ("application/json", "utf-8-sig"),
        ("application/json; charset=UTF-8", "utf-8"),
        ('application/json; charset="utf8"; x=y', "utf-8"),
        ("text/plain; Charset=ISO-8859-1", "latin-1"),
        ("application/json;charset=windows-1252", "cp1252"),
        ("application/json; charset=utf-16", "utf-16"),
        ("application/json; charset=utf-16be", "utf-16-be"),
        ("application/x-www-form-urlencoded", "utf-8"),  # what curl -d says
    ],
)
async def test_json_in_the_character_set_that_it_says(server: HttpServer, content_type: str, charset: str) -> None:
    body = '{"süß": "é"}'.encode(charset)
    request = post(b"content-type: " + content_type.encode(), target=b"/json", body=body)
    assert await answers(server, request + LAST) == [(200, '{"süß":"é"}'.encode()), GOODBYE]


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/v1/models/", "/v1/models", ""),
        (b"/v1//models", "/v1/models", ""),
        (b"/v1/models/org%2Fname", "/v1/models/org/name", ""),
        (b"/v1/models/org/name/?a=b&c", "/v1/models/org/name", "a=b&c"),
        (b"http://a:80", "/", ""),
        (b"http://a?x", "/", "x"),
        (b"//", "/", ""),
        (b"/?", "/", ""),
    ],
)
async def test_targets(server: HttpServer, target: bytes, path: str, query: str) -> None:
    request = b"GET %b HTTP/1.1\r\nhost: a\r\n\r\n" % target
    assert (await answers(server, request + LAST))[0] == (200, f"GET {path} {query} 0 ".encode())


async def test_http_1_0_gets_no_chunks(server: HttpServer) -> None:
    for headers in ((), (b"connection: keep-alive",)):
        answer = await said(server, post(*headers, target=b"/stream", version=b"1.0"))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert body == b"data: 1\n\ndata: 2\n\n"
        assert b"transfer-encoding" not in head
        assert b"connection: close" in head
    assert split(await said(server, post(version=b"1.0"))) == [HELLO]
    assert split(await said(server, b"GET /echo HTTP/1.0\r\n\r\n")) == [(200, b"GET /echo  0 ")], "without a host"
    chunks = await said(server, post(b"connection: close", target=b"/stream"))
    assert chunks.endswith(b"\r\n\r\n9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n")


async def test_head_and_options(server: HttpServer) -> None:
    answer = await said(server, b"HEAD /echo HTTP/1.1\r\nhost: a\r\n\r\nHEAD /x HTTP/1.1\r\nhost: a\r\n\r\n" + LAST)
    assert [status for status, _ in split(answer.removesuffix(GOODBYE[1]), bodies=False)] == [200, 404, 200]
    for target, allowed in ((b"/echo", b"allow: GET, POST, HEAD, OPTIONS"), (b"*", b"allow: GET, POST")):
        answer = await said(server, b"OPTIONS %b HTTP/1.1\r\nhost: a\r\n\r\n" % target + LAST)
        assert answer.startswith(b"HTTP/1.1 204 ")
        assert allowed in answer


async def test_a_body_is_asked_for_only_where_it_is_wanted(server: HttpServer) -> None:
    go_on = b"HTTP/1.1 100 Continue\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(post(b"expect: 100-continue", b"content-length: 5", body=b""))
    async with asyncio.timeout(10):
        assert await reader.readexactly(len(go_on)) == go_on
        writer.write(b"hello" + LAST)
        assert split(await reader.read()) == [HELLO, GOODBYE]
    writer.close()
    # Where it is not, nobody can say whether it comes: what follows is not taken for it, nor for a request.
    for target, length, status in ((b"/nothing", 5, 404), (b"/echo", 1 << 20, 413)):
        request = post(b"expect: 100-continue", b"content-length: %d" % length, target=target, body=b"")
        assert [found for found, _ in await answers(server, request, LAST)] == [status]


async def test_pipelined_requests_are_answered_in_turn(server: HttpServer) -> None:
    assert await answers(server, post() * 3 + post(*H2C) + LAST + post()) == [HELLO] * 4 + [GOODBYE]


async def test_an_early_error_leaves_the_rest_of_the_body_and_goes_on(server: HttpServer) -> None:
    for framing, rest in (
        (b"content-length: 200000", b"x" * 200_000),
        (b"transfer-encoding: chunked", b"1000\r\n" + b"x" * 4096 + b"\r\n0\r\n\r\n"),
    ):
        head = post(framing, target=b"/nothing", body=b"")
        found = await answers(server, head + rest[:1000], rest[1000:] + LAST)
        assert [status for status, _ in found] == [404, 200]
        assert found[1] == GOODBYE


async def test_what_follows_an_early_error_has_an_end(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By time and by size; and no second answer is written that the next request would take for its own."""
    head = post(b"content-length: 99999999", body=b"")
    monkeypatch.setattr("router.doors.http.server._LOOK_S", 0.02)
    async with serving(0.2) as impatient:
        assert [status for status, _ in await answers(impatient, head + b"x")] == [413]
    monkeypatch.setattr("router.doors.http.connection._DISCARDED_BYTES", 1000)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head)
    async with asyncio.timeout(10):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
        writer.write(b"x" * 5000)
        try:
            rest = await reader.read()
        except ConnectionResetError:
            rest = b""
    assert b"HTTP/1.1" not in rest
    writer.close()


async def test_a_refused_head_starts_nothing_of_what_follows_it(server: HttpServer) -> None:
    """What stands in the same packet behind it, and a body that would have been another request's."""
    for bad in (b"POST /echo HTTP/1.1\r\ncontent-length: 5\r\n\r\nhello", post(b"x: " + b"y" * 40_000)):
        assert len(await answers(server, bad + LAST)) == 1
        assert (await answers(server, post() + bad + LAST))[0] == HELLO
