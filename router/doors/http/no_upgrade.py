"""A parser for which `Upgrade` is a header as any other.

Java's HttpClient and `curl --http2` ask for HTTP/2 with each first request (`Upgrade: h2c`); a server may pass that
over and answer in HTTP/1.1. httptools takes such a request to end with its head, and what follows for another protocol:

    head with Upgrade ──> httptools: complete, paused ──> a new parser takes the rest: the body first, if there is one
"""

from __future__ import annotations

from typing import Any

import httptools


class UpgradeBlindParser:
    """As httptools.HttpRequestParser, for a protocol of uvicorn's."""

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._parser = _parser(protocol)
        self._owes_body = False

    def feed_data(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on(data[upgrade.args[0] :])

    def message_goes_on(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Asked when httptools says that a message is complete: whether its body has yet to come."""
        if not self._parser.should_upgrade():
            return False
        self._owes_body = any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip(b" 0"))
            for name, value in headers
        )
        return self._owes_body

    def _go_on(self, rest: bytes) -> None:
        if self._owes_body:
            self._owes_body = False
            framing = next(
                b"%b: %b\r\n" % header
                for header in self._protocol.headers
                if header[0] in (b"transfer-encoding", b"content-length")
            )
            self._parser = _parser(_AfterHead(self._protocol))
            self._parser.feed_data(b"POST / HTTP/1.1\r\nhost: a\r\n%b\r\n" % framing)
        else:
            self._parser = _parser(self._protocol)
        if rest:
            self.feed_data(rest)

    def should_upgrade(self) -> bool:
        return False

    def get_http_version(self) -> str:
        return self._parser.get_http_version()

    def get_method(self) -> bytes:
        return self._parser.get_method()

    def should_keep_alive(self) -> bool:
        return self._parser.should_keep_alive()


def _parser(protocol: Any) -> Any:
    parser = httptools.HttpRequestParser(protocol)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
    return parser


class _AfterHead:
    """What a parser says of a body whose head another has read, and of all messages after it."""

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._in_head = True
        self.on_body = protocol.on_body
        self.on_message_complete = protocol.on_message_complete

    def on_message_begin(self) -> None:
        if not self._in_head:
            self._protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._in_head:
            self._protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            self._protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._in_head:
            self._in_head = False
        else:
            self._protocol.on_headers_complete()

    def on_chunk_header(self) -> None:
        told = getattr(self._protocol, "on_chunk_header", None)
        if told is not None:
            told()
