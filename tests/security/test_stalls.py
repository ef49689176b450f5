"""Nothing that a client sends keeps the router's event loop from its other clients: loops over a client's elements.

The measure is the longest time between two turns of the loop, in processor time of this process (tests/support/stalls.py).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.inference import open_inference_pb2 as pb
from diptych.v1 import generate_pb2

from router.config import RouterConfig
from tests.support.in_process_router import GENERATE, SESSION, InProcessRouter
from tests.support.raw_http import Http
from tests.support.stalls import stalls_of

MOST_S = 0.1
BYTES = 9 << 20  # what a body, and a message, may have


@pytest.fixture(scope="module")
def running(model_path: Path) -> Iterator[InProcessRouter]:
    router = InProcessRouter(RouterConfig(model=str(model_path), grpc_port=0, http_port=0, internal_port=0))
    try:
        router.answers()
        yield router
    finally:
        router.close()


def repeated(begin: str, element: str, end: str, size: int = BYTES - 1000) -> bytes:
    """As many elements as there is room for; `%d` in one becomes its number."""
    if "%d" in element:
        one = len(element % 1000000)
        elements = ",".join([element % (1000000 + n) for n in range((size - len(begin) - len(end)) // (one + 1))])
    else:
        elements = ",".join([element] * ((size - len(begin) - len(end)) // (len(element) + 1)))
    return (begin + elements + end).encode()


MESSAGES = '"messages":[{"role":"user","content":"x"}]'
BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "unknown keys": ("/v1/chat/completions", lambda: repeated("{" + MESSAGES + ",", '"k%d":1', "}")),
    "unknown keys in a message": (
        "/v1/chat/completions", lambda: repeated('{"messages":[{"role":"user","content":"x",', '"k%d":1', "}]}")),
    "messages": ("/v1/chat/completions", lambda: repeated('{"messages":[', '{"role":"user","content":"x"}', "]}")),
    "empty messages": ("/v1/chat/completions", lambda: repeated('{"messages":[', "{}", "]}")),
    "numbers for messages": ("/v1/chat/completions", lambda: repeated('{"messages":[', "1", "]}")),
    "content parts": (
        "/v1/chat/completions",
        lambda: repeated('{"messages":[{"role":"user","content":[', '{"type":"text","text":"x"}', "]}]}"),
    ),
    "empty content parts": (
        "/v1/chat/completions", lambda: repeated('{"messages":[{"role":"user","content":[', "{}", "]}]}")),
    "tools": (
        "/v1/chat/completions",
        lambda: repeated("{" + MESSAGES + ',"tools":[', '{"type":"function","function":{"name":"f%d"}}', "]}"),
    ),
    "properties of one tool": (
        "/v1/chat/completions",
        lambda: repeated(
            "{" + MESSAGES + ',"tools":[{"type":"function","function":{"name":"f","parameters":{"properties":{',
            '"p%d":{}', "}}}}]}"),
    ),
    "stop": ("/v1/chat/completions", lambda: repeated("{" + MESSAGES + ',"stop":[', '"x%d"', "]}")),
    "logit_bias": ("/v1/chat/completions", lambda: repeated("{" + MESSAGES + ',"logit_bias":{', '"%d":1', "}}")),
    "metadata": ("/v1/chat/completions", lambda: repeated("{" + MESSAGES + ',"metadata":{', '"%d":"1"', "}}")),
    "nested lists": ("/v1/chat/completions", lambda: repeated("{" + MESSAGES + ',"metadata":[', "[]", "]}")),
    "deep nesting": ("/v1/chat/completions", lambda: b'{"a":' + b"[" * (BYTES - 1000)),
    "template variables": (
        "/v1/chat/completions", lambda: repeated("{" + MESSAGES + ',"chat_template_kwargs":{', '"k%d":1', "}}")),
    "choices of a format": (
        "/v1/chat/completions", lambda: repeated("{" + MESSAGES + ',"guided_choice":[', '"c%d"', "]}")),
    "a schema": (
        "/v1/chat/completions",
        lambda: repeated(
            "{" + MESSAGES + ',"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"properties":{',
            '"p%d":{}', "}}}}}"),
    ),
    "one long message": ("/v1/chat/completions", lambda: b'{"messages":[{"role":"user","content":"' + b"a" * 7000000 + b'"}]}'),
    "escapes": (
        "/v1/chat/completions", lambda: b'{"messages":[{"role":"user","content":"' + b"\\u4e2d" * 1400000 + b'"}]}'),
    "prompts": ("/v1/completions", lambda: repeated('{"prompt":[', '"x%d"', "]}")),
    "prompts of one token": ("/v1/completions", lambda: repeated('{"prompt":[', "[1]", "]}")),
    "token ids": ("/v1/completions", lambda: repeated('{"prompt":[', "1", "]}")),
    "token ids that are too large": ("/v1/completions", lambda: repeated('{"prompt":[', "99999999", "]}")),
    "token ids that are none": ("/v1/completions", lambda: repeated('{"prompt":[', "1.5", "]}")),
    "nulls for token ids": ("/v1/completions", lambda: repeated('{"prompt":[', "null", "]}")),
    "response input": ("/v1/responses", lambda: repeated('{"input":[', '{"role":"user","content":"x"}', "]}")),
    "empty response input": ("/v1/responses", lambda: repeated('{"input":[', "{}", "]}")),
    "CJK to tokenize": ("/tokenize", lambda: json.dumps({"prompt": "中文字符測試語言模型" * 50000}).encode()),
    "one word to tokenize": ("/tokenize", lambda: json.dumps({"prompt": "a" * 500000}).encode()),
    "spaces to tokenize": ("/tokenize", lambda: json.dumps({"prompt": " " * 500000}).encode()),
    "messages to tokenize": ("/tokenize", lambda: repeated('{"messages":[', '{"role":"user","content":"x"}', "]}")),
    "tokens to detokenize": ("/detokenize", lambda: repeated('{"tokens":[', "1", "]}")),
    "a CJK prompt": ("/v1/completions", lambda: json.dumps({"prompt": "中文字符測試語言模型" * 5000}, ensure_ascii=False).encode()),
}  # fmt: skip


@pytest.mark.parametrize("attack", BODIES)
def test_bodies(running: InProcessRouter, attack: str) -> None:
    path, make = BODIES[attack]
    body = make()
    assert running.router.http is not None
    http = Http(running.router.http.port)
    with stalls_of(running) as stalls:
        answer = http.ask("POST", path, body, {"content-type": "application/json"}, timeout_s=120)
    assert answer.status < 500 or answer.status == 503
    if answer.status >= 400:
        assert len(answer.body) < 4096, "one cause and one fix"
    running.becomes_empty()
    assert stalls.longest_s < MOST_S


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def numbered(message: Any, name: str) -> int:
    return message.DESCRIPTOR.fields_by_name[name].number


def many(message: Any, name: str, content: bytes, size: int = BYTES - 1000) -> bytes:
    one = field(numbered(message, name), content)
    return one * (size // len(one))


def in_request(content: bytes) -> bytes:
    return field(numbered(generate_pb2.StartRequest, "request"), content)


R, S, P = generate_pb2.GenerateRequest, generate_pb2.SamplingParams, pb.ModelInferRequest
TOKENS = generate_pb2.TokenIds
INFER, STREAM_INFER = "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer"


def sampling(content: bytes) -> bytes:
    return field(numbered(R, "text"), b"x") + field(numbered(R, "sampling"), content)


def unpacked_ids() -> bytes:
    one = varint(numbered(TOKENS, "ids") << 3) + b"\1"
    return field(numbered(R, "token_ids"), one * ((BYTES - 1000) // 2))


MESSAGES_OF: dict[str, tuple[str, Callable[[], bytes]]] = {
    "cancels": (SESSION, lambda: many(generate_pb2.SessionRequest, "cancels", b"")),
    "starts": (SESSION, lambda: many(generate_pb2.SessionRequest, "starts", b"")),
    "starts that are no good": (
        SESSION, lambda: many(generate_pb2.SessionRequest, "starts", in_request(field(numbered(R, "text"), b"")))),
    "unpacked token ids": (GENERATE, unpacked_ids),
    "packed token ids": (
        GENERATE, lambda: field(numbered(R, "token_ids"), field(numbered(TOKENS, "ids"), b"\1" * (BYTES - 1000)))),
    "stop": (GENERATE, lambda: sampling(many(S, "stop", b""))),
    "stop_token_ids": (GENERATE, lambda: sampling(field(numbered(S, "stop_token_ids"), b"\1" * (BYTES - 1000)))),
    "logit_bias": (GENERATE, lambda: sampling(many(S, "logit_bias", b""))),
    "messages": (GENERATE, lambda: field(numbered(R, "chat"), many(generate_pb2.Chat, "messages", b""))),
    "unknown fields": (GENERATE, lambda: b"\xf8\x07\x01" * ((BYTES - 1000) // 3)),
    "emitted": (
        GENERATE,
        lambda: field(numbered(R, "text"), b"x") + field(numbered(R, "emitted_token_ids"), b"\1" * (BYTES - 1000)),
    ),
    "tensors": (INFER, lambda: many(P, "inputs", b"")),
    "tensors of a stream": (STREAM_INFER, lambda: many(P, "inputs", b"")),
    "raw contents": (INFER, lambda: many(P, "raw_input_contents", b"")),
    "outputs": (INFER, lambda: many(P, "outputs", b"")),
    "parameters": (INFER, lambda: many(P, "parameters", b"")),
    "elements of a tensor": (
        INFER,
        lambda: P(
            inputs=[
                P.InferInputTensor(
                    name="text_input", datatype="BYTES", shape=[(BYTES - 1000) // 4],
                )
            ],
            raw_input_contents=[struct.pack("<I", 0) * ((BYTES - 1000) // 4)],
        ).SerializeToString(),
    ),
    "a shape": (INFER, lambda: field(numbered(P, "inputs"), field(3, b"\1" * (BYTES - 1000)))),
}  # fmt: skip


@pytest.mark.parametrize("attack", MESSAGES_OF)
def test_messages(running: InProcessRouter, attack: str) -> None:
    method, make = MESSAGES_OF[attack]
    data = make()
    call = running.public.stream_stream(method, request_serializer=None, response_deserializer=None)
    with stalls_of(running) as stalls:
        try:
            answers = sum(len(a) for a in call(iter([data]), timeout=120))
        except grpc.RpcError as error:
            answers = len(error.details() or "")  # type: ignore[attr-defined]
            assert error.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)  # type: ignore[attr-defined]
    assert answers < 1 << 20
    running.becomes_empty()
    assert stalls.longest_s < MOST_S
