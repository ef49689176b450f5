"""What a slow or greedy client meets, with limits of tenths of a second, and no router behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator

import pytest

from router.config import HttpConfig
from router.doors.http.app import App, Exchange
from router.doors.http.server import HttpServer, bind


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HttpServer]:
    monkeypatch.setattr("router.doors.http.server._LOOK_S", 0.02)
    limits = HttpConfig(max_connections=3, read_timeout_s=0.2, write_timeout_s=0.2, keep_alive_s=1)
    app = App(random.Random(1), [])

    async def echo(exchange: Exchange) -> None:
        await exchange.respond(200, await exchange.body(1 << 20), b"text/plain")

    async def large(exchange: Exchange) -> None:
        await exchange.respond(200, b"x" * (64 << 20), b"text/plain")

    async def headers(exchange: Exchange) -> None:
        await exchange.body(1 << 20)
        await exchange.respond(200, b" ".join(sorted(exchange.headers)) + repr(exchange.headers).encode())

    app.route("POST", "/echo", echo)
    app.route("POST", "/headers", headers)
    app.route("GET", "/large", large)
    server = HttpServer(app, limits, bind("127.0.0.1", 0))
    await server.start()
    yield server
    await server.stop()


async def said(server: HttpServer, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(data)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(
    "begun", [b"", b"POST /echo HTTP/1.1\r\nhost", b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nabc"]
)
async def test_a_request_that_does_not_arrive_is_answered_and_closed(server: HttpServer, begun: bytes) -> None:
    answer = await said(server, begun)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive whole within 0.2 s" in answer


async def test_a_client_that_takes_nothing_is_dropped(server: HttpServer) -> None:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    client.setblocking(False)
    client.send(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
    async with asyncio.timeout(10):
        while not server.connections:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while server.connections:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    client.close()


async def test_more_connections_than_there_may_be(server: HttpServer) -> None:
    idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
    answer = await said(server, b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1\r\n" in answer
    for _, writer in idle:
        writer.close()


async def test_a_body_that_is_too_large_is_refused_before_it_is_read(server: HttpServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999\r\n\r\n")
    async with asyncio.timeout(10):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()


CHUNKED = b"POST /echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
TRAILERS = {
    "one that never ends": (CHUNKED + b"3\r\nabc\r\n0\r\nx: ", b"y" * 65536),
    "many": (CHUNKED + b"0\r\n", b"x: yyyyyyyyyyyy\r\n" * 4096),
    "an extension that never ends": (CHUNKED + b"3;x=", b"y" * 65536),
    "after chunks that were to save up for it": (CHUNKED + b"1\r\nx\r\n" * 50000 + b"0\r\nx: ", b"y" * 65536),
}


@pytest.mark.parametrize("attack", TRAILERS)
async def test_what_comes_beside_a_body_is_bounded(server: HttpServer, attack: str) -> None:
    begin, more = TRAILERS[attack]
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(begin)
    sent = 0
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(20):
            while sent < 64 << 20:
                writer.write(more)
                await writer.drain()
                sent += len(more)
    assert sent < 16 << 20, "cut off, and the rest of it fills socket buffers at most"
    with contextlib.suppress(ConnectionError):
        assert b" 431 " in await reader.readline()
    writer.close()


async def test_trailers_are_not_headers(server: HttpServer) -> None:
    """They come when the request has been let in: as headers they would take another's key, or name a new one."""
    trailing = b"authorization: Bearer other\r\nx-request-id: theirs\r\n"
    begin = CHUNKED.replace(b"/echo", b"/headers") + b"3\r\nabc\r\n"
    answer = await said(server, begin + b"0\r\n" + trailing + b"\r\nGET /none HTTP/1.1\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"host transfer-encoding" in answer
    assert b"Bearer" not in answer
    assert b"theirs" not in answer


async def test_small_chunks_are_taken(server: HttpServer) -> None:
    body = b"1\r\nx\r\n" * 60000
    answer = await said(server, CHUNKED.replace(b"host: a", b"host: a\r\nconnection: close") + body + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"x" * 60000)
