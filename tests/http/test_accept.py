"""Connections before they have said anything: counted, given a time, and never a reason to spin."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deploy.certificates import Authority
from router.config import HttpConfig
from router.doors.http.app import App, Exchange
from router.doors.http.server import HttpServer, bind
from settings.security import CertificateFiles
from settings.tls import TlsFiles

MOST = 5


@pytest.fixture
async def encrypted(tmp_path: Path) -> AsyncIterator[tuple[HttpServer, ssl.SSLContext]]:
    Authority("public-ca", tmp_path, 30).issue("public", ["localhost"])
    files = CertificateFiles(certificate=str(tmp_path / "public.crt"), key=str(tmp_path / "public.key"))
    app = App(random.Random(1), [])

    async def hello(exchange: Exchange) -> None:
        await exchange.respond(200, b"hello", b"text/plain")

    app.route("GET", "/", hello)
    server = HttpServer(
        app, HttpConfig(max_connections=MOST), bind("127.0.0.1", 0), TlsFiles(files, "", "public_tls"), handshake_s=0.3
    )
    await server.start()
    yield server, ssl.create_default_context(cafile=str(tmp_path / "public-ca.crt"))
    await server.stop()


async def hello(server: HttpServer, context: ssl.SSLContext) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname="localhost")
    writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01"], ids=["silent", "half a greeting"])
async def test_half_open_tls_is_counted_and_timed_out(
    encrypted: tuple[HttpServer, ssl.SSLContext], first: bytes
) -> None:
    server, context = encrypted
    assert (await hello(server, context)).endswith(b"hello")
    idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(4 * MOST)]
    for _, writer in idle:
        writer.write(first)
    async with asyncio.timeout(20):
        began = time.monotonic()
        while server.connections < MOST:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert server.connections == MOST, "the rest is closed at once"
        for reader, _ in idle:
            try:
                assert len(await reader.read()) < 50, "an alert at most"
            except ConnectionError:
                pass
        assert time.monotonic() - began < 10
        while server.connections:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    for _, writer in idle:
        writer.close()
    assert (await hello(server, context)).endswith(b"hello")


async def test_stopping_does_not_wait_for_those_that_have_not_greeted(
    encrypted: tuple[HttpServer, ssl.SSLContext],
) -> None:
    server, _ = encrypted
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    while not server.connections:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        await server._acceptor.stop()
    assert not server.connections
    server._acceptor.start()
    writer.close()


class OutOfFiles(socket.socket):
    """As `accept` does when the process has no descriptor left."""

    broken = True
    asked = 0

    def accept(self) -> tuple[socket.socket, object]:
        self.asked += 1
        if self.broken:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_without_file_descriptors_it_waits_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("router.doors.http.accept._PAUSE_S", 0.05)
    listener = OutOfFiles(socket.AF_INET)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.setblocking(False)
    app = App(random.Random(1), [])

    async def hello(exchange: Exchange) -> None:
        await exchange.respond(200, b"hello", b"text/plain")

    app.route("GET", "/", hello)
    server = HttpServer(app, HttpConfig(), listener)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    async with asyncio.timeout(20):
        while listener.asked < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert caplog.text.count("raise the limit of open files") == 1
        listener.broken = False
        assert (await reader.read()).endswith(b"hello")
    writer.close()
    await server.stop()
