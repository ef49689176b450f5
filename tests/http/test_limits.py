"""What a slow or greedy client meets, with limits of tenths of a second, and no router behind."""

from __future__ import annotations

import asyncio
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

    app.route("POST", "/echo", echo)
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
    "begun", [b"", b"POST /echo HTTP/1.1\r\nhost", b"POST /echo HTTP/1.1\r\ncontent-length: 10\r\n\r\nabc"]
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
