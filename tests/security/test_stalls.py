"""Nothing that a client sends keeps the router's event loop from its other clients: loops over a client's elements.

The measure is the longest time between two turns of the loop, in processor time (tests/support/stalls.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.inference import open_inference_pb2 as pb
from diptych.v1 import generate_pb2

from router.config import RouterConfig
from router.doors.elements import MAX_BRACKETS, MAX_ELEMENTS, MAX_FIELDS, MAX_STRINGS
from tests.support.in_process_router import GENERATE, SESSION, InProcessRouter
from tests.support.raw_http import Http
from tests.support.stalls import PACE_S, pace_s, stalls_of

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


class Size:
    """Of the attack: all that a body may have; or as much as is still within the counts, and gets further."""

    counted = False

    def of_json(self, element: str, room: int) -> int:
        fitting = room // (len(element % 1000000 if "%d" in element else element) + 1)
        if not self.counted:
            return fitting
        strings, brackets = element.count('"') // 2, element.count("{") + element.count("[")
        return min(
            fitting,
            (MAX_STRINGS - 50) // strings if strings else MAX_ELEMENTS - 50,
            (MAX_BRACKETS - 50) // brackets if brackets else fitting,
            (MAX_ELEMENTS - 50) // (element.count(",") + 1),
        )

    def of_proto(self, one: bytes) -> int:
        fitting = (BYTES - 1000) // len(one)
        return min(fitting, (MAX_FIELDS - 50) // 3) if self.counted else fitting

    def of_numbers(self) -> int:
        return 4 * MAX_ELEMENTS if self.counted else BYTES - 1000


SIZE = Size()


@pytest.fixture(params=["all that fits", "within the counts"], autouse=True)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SIZE, "counted", request.param == "within the counts")


def repeated(begin: str, element: str, end: str) -> bytes:
    """As many elements as there is room for; `%d` in one becomes its number."""
    count = SIZE.of_json(element, BYTES - 1000 - len(begin) - len(end))
    elements = [element % (1000000 + n) for n in range(count)] if "%d" in element else [element] * count
    return (begin + ",".join(elements) + end).encode()


def text_of(prompt: str) -> bytes:
    return json.dumps({"prompt": prompt}, ensure_ascii=False).encode()


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
            "{" + MESSAGES + ',"response_format":{"type":"json_schema",'
            '"json_schema":{"name":"x","schema":{"properties":{',
            '"p%d":{}', "}}}}}"),
    ),
    "one long message": (
        "/v1/chat/completions", lambda: b'{"messages":[{"role":"user","content":"' + b"a" * 7000000 + b'"}]}'),
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
    "CJK to tokenize": ("/tokenize", lambda: text_of("中文字符測試語言模型" * 50000)),
    "CJK with its tokens' names": (
        "/tokenize", lambda: text_of("中文字符測試語言模型" * 50000)[:-1] + b',"return_token_strs":true}'),
    "one word to tokenize": ("/tokenize", lambda: text_of("a" * 500000)),
    "spaces to tokenize": ("/tokenize", lambda: text_of(" " * 500000)),
    "messages to tokenize": ("/tokenize", lambda: repeated('{"messages":[', '{"role":"user","content":"x"}', "]}")),
    "tokens to detokenize": ("/detokenize", lambda: repeated('{"tokens":[', "1", "]}")),
    "a CJK prompt": ("/v1/completions", lambda: text_of("中文字符測試語言模型" * 5000)),
}  # fmt: skip


@pytest.mark.parametrize("attack", BODIES)
def test_bodies(running: InProcessRouter, attack: str) -> None:
    path, make = BODIES[attack]
    body = make()
    assert running.router.http is not None
    http = Http(running.router.http.port)

    def attack_once() -> float:
        with stalls_of(running) as stalls:
            answer = http.ask("POST", path, body, {"content-type": "application/json"}, timeout_s=120)
        assert answer.status < 500 or answer.status == 503
        if answer.status >= 400:
            assert len(answer.body) < 4096, "one cause and one fix"
        running.becomes_empty()
        return stalls.longest_s

    assert at_best(attack_once) < MOST_S


def at_best(attack_once: Callable[[], float]) -> float:
    """Seconds of a processor of `PACE_S`. Other threads' work counts, too, where it falls together with a stall: what
    does not come back is not ours.
    """
    longest = math.inf
    for _ in range(3):
        stalled_s, pace = attack_once(), pace_s()
        longest = min(longest, stalled_s * min(1.0, PACE_S / pace))
        if longest < MOST_S:
            break
    return longest


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


def many(message: Any, name: str, content: bytes) -> bytes:
    one = field(numbered(message, name), content)
    return one * SIZE.of_proto(one)


def in_request(content: bytes) -> bytes:
    return field(numbered(generate_pb2.StartRequest, "request"), content)


R, S, P = generate_pb2.GenerateRequest, generate_pb2.SamplingParams, pb.ModelInferRequest
TOKENS = generate_pb2.TokenIds
INFER, STREAM_INFER = "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer"


def sampling(content: bytes) -> bytes:
    return field(numbered(R, "text"), b"x") + field(numbered(R, "sampling"), content)


def unpacked_ids() -> bytes:
    one = varint(numbered(TOKENS, "ids") << 3) + b"\1"
    return field(numbered(R, "token_ids"), one * SIZE.of_proto(one))


MESSAGES_OF: dict[str, tuple[str, Callable[[], bytes]]] = {
    "cancels": (SESSION, lambda: many(generate_pb2.SessionRequest, "cancels", b"")),
    "starts": (SESSION, lambda: many(generate_pb2.SessionRequest, "starts", b"")),
    "starts that are no good": (
        SESSION, lambda: many(generate_pb2.SessionRequest, "starts", in_request(field(numbered(R, "text"), b"")))),
    "unpacked token ids": (GENERATE, unpacked_ids),
    "packed token ids": (
        GENERATE, lambda: field(numbered(R, "token_ids"), field(numbered(TOKENS, "ids"), b"\1" * SIZE.of_numbers()))),
    "stop": (GENERATE, lambda: sampling(many(S, "stop", b""))),
    "stop_token_ids": (GENERATE, lambda: sampling(field(numbered(S, "stop_token_ids"), b"\1" * SIZE.of_numbers()))),
    "logit_bias": (GENERATE, lambda: sampling(many(S, "logit_bias", b""))),
    "allowed_token_ids": (
        GENERATE, lambda: sampling(field(numbered(S, "allowed_token_ids"), b"\1" * SIZE.of_numbers()))),
    "bad_words": (GENERATE, lambda: sampling(many(S, "bad_words", b""))),
    "messages": (GENERATE, lambda: field(numbered(R, "chat"), many(generate_pb2.ChatMessages, "messages", b""))),
    "unknown fields": (GENERATE, lambda: b"\xf8\x07\x01" * SIZE.of_proto(b"abc")),
    "emitted": (
        GENERATE,
        lambda: field(numbered(R, "text"), b"x") + field(numbered(R, "emitted_token_ids"), b"\1" * SIZE.of_numbers()),
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

    def attack_once() -> float:
        answers = 0
        with stalls_of(running) as stalls:
            under_way: Any = call(iter([data]), timeout=120)
            with contextlib.suppress(grpc.RpcError):
                for answer in under_way:
                    answers += len(answer)
        assert under_way.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
        assert answers + len(under_way.details() or "") < 1 << 20
        running.becomes_empty()
        return stalls.longest_s

    assert at_best(attack_once) < MOST_S
