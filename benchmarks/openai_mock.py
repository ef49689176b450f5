"""A backend as other routers expect one: OpenAI's streaming over HTTP, a token every `period_ms` for every stream.

All streams step together, as a decode batch does. `python -m benchmarks.openai_mock PORT PERIOD_MS MODEL`.
"""

from __future__ import annotations

import argparse
import asyncio
import json

_CHUNK = (
    b'data: {"id":"chatcmpl-mock","object":"chat.completion.chunk","created":1,"model":"%b","choices":[{"index":0,'
    b'"delta":{"content":" the"},"logprobs":null,"finish_reason":null}]}\n\n'
)
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Streams:
    def __init__(self) -> None:
        self.left: dict[Mock, int] = {}

    async def step(self, period_s: float, model: bytes) -> None:
        chunk = _CHUNK % model
        data = b"%x\r\n%b\r\n" % (len(chunk), chunk)
        done = b"data: [DONE]\n\n"
        end = b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done)
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + period_s, loop.time())
            await asyncio.sleep(max(0.0, due - loop.time()))
            for stream, left in list(self.left.items()):
                if left > 1:
                    self.left[stream] = left - 1
                    stream.transport.write(data)
                else:
                    del self.left[stream]
                    stream.transport.write(data + end)


class Mock(asyncio.Protocol):
    """Enough HTTP for a router that keeps its connections."""

    transport: asyncio.Transport

    def __init__(self, streams: Streams, model: str) -> None:
        self._streams = streams
        self._model = model
        self._data = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._streams.left.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self._data += data
        while True:
            head, found, rest = self._data.partition(b"\r\n\r\n")
            if not found:
                return
            lines = head.split(b"\r\n")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(b":") for line in lines[1:])}
            length = int(headers.get(b"content-length", b"0"))
            if len(rest) < length:
                return
            self._data, body = rest[length:], rest[:length]
            self._answer(lines[0].split(b" ")[1], body)

    def _answer(self, path: bytes, body: bytes) -> None:
        if path.endswith(b"/chat/completions"):
            self.transport.write(_HEAD)
            asked = json.loads(body)
            self._streams.left[self] = (
                asked.get("max_tokens") or asked["max_completion_tokens"]
            )  # one router renames it
            return
        info = {
            "object": "list", "data": [{"id": self._model, "object": "model", "owned_by": "mock"}], "status": "ok",
            "model_path": self._model, "served_model_name": self._model, "model_id": self._model, "version": "0",
            "is_generation": True, "tokenizer_path": self._model, "max_running_requests": 4096,
        }  # fmt: skip
        answer = json.dumps(info).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(answer)
        self.transport.write(head + answer)


async def serve(port: int, period_s: float, model: str) -> None:
    streams = Streams()
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Mock(streams, model), "127.0.0.1", port, backlog=2048)
    await streams.step(period_s, model.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("period_ms", type=float)
    parser.add_argument("model")
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.port, arguments.period_ms / 1e3, arguments.model))


if __name__ == "__main__":
    main()
