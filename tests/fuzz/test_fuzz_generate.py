"""Generate, given anything: it ends soon with an answer or a status that says why, and the router is as good as new."""

from __future__ import annotations

import resource
import time
from typing import Any

import grpc
import pytest
from diptych.v1 import generate_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.fuzz import examples
from tests.support.in_process_router import GENERATE, VOCABULARY, InProcessRouter
from tests.support.processes import Reply
from tests.support.wire_bytes import field, mutated, soup, varint

BAD_INPUT = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
ENOUGH = 6  # messages of an answer; then the client leaves

FLOATS = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -0.0, 1e-45, 1.0, 2.0, 3.4e38, float("inf"), float("nan")])
)
UINT32 = st.one_of(st.integers(0, 40), st.sampled_from([8191, 8192, VOCABULARY, 1 << 31, (1 << 32) - 1]))
TEXT = st.one_of(st.text(max_size=30), st.sampled_from(["\0", "\n", " ", "a" * 5000, "é", "😀" * 9, "<|im_end|>"]))
SHORT = st.sampled_from(["", "x", "a" * 257, "é" * 200, "\0"])
JSON = st.one_of(
    st.sampled_from(
        [
            *("{}", "[]", "{", "null", '{"a": 1}', '{"tools": []}', '{"chat_template": "{{ 1 }}"}', "[" * 300, "NaN"),
            *(
                '[{"type": "function", "function": {"name": "f"}}]',
                '[{"function": {"name": "a b"}}]',
                '[{"function": 1}]',
            ),
            *('{"type": "string"}', '{"type": "strin"}', '{"$ref": "#"}', '{"enum": [1e999]}', '{"not": {}}', "true"),
            *('{"pattern": "(a+)+$"}', '{"allOf": [{"type": "string"}, {"type": "null"}]}', '{"minLength": -1}'),
        ]
    ),
    TEXT,
)
LARK = st.sampled_from(
    ["start: /x/", "start: start", "start: y", 'start: "a', "start: %json {", "x" * 100, "start: <[1]>"]
)
REGEX = st.one_of(st.sampled_from(["a|b", "[", "(a*)*", "a{1000}{1000}", "(?=a)", "^$", "\\p{Greek}"]), TEXT)
STRUCTURED = st.one_of(
    JSON.map(lambda text: generate_pb2.StructuredOutput(json_schema=text)),
    REGEX.map(lambda text: generate_pb2.StructuredOutput(regex=text)),
    LARK.map(lambda text: generate_pb2.StructuredOutput(lark=text)),
    st.booleans().map(lambda value: generate_pb2.StructuredOutput(json_object=value)),
    st.lists(TEXT, max_size=3).map(
        lambda options: generate_pb2.StructuredOutput(choice=generate_pb2.Choice(options=options))
    ),
    st.just(generate_pb2.StructuredOutput()),
)


@st.composite
def requests(draw: st.DrawFn) -> generate_pb2.GenerateRequest:
    """Fields in and out of their ranges; about half are accepted."""

    def maybe(strategy: Any) -> Any:
        return draw(strategy) if draw(st.integers(0, 3)) == 0 else None

    sampling = generate_pb2.SamplingParams(max_tokens=draw(st.integers(1, 5)))
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        value = maybe(FLOATS)
        if value is not None:
            setattr(sampling, name, value)
    for name in ("top_k", "max_tokens", "min_tokens", "logprobs"):
        value = maybe(UINT32)
        if value is not None:
            setattr(sampling, name, value)
    sampling.stop.extend(maybe(st.lists(TEXT, max_size=18)) or [])
    sampling.stop_token_ids.extend(maybe(st.lists(UINT32, max_size=4)) or [])
    sampling.allowed_token_ids.extend(maybe(st.lists(UINT32, max_size=4)) or [])
    sampling.bad_words.extend(maybe(st.lists(TEXT, max_size=3)) or [])
    seed = maybe(st.integers(0, (1 << 64) - 1))
    if seed is not None:
        sampling.seed = seed
    for token, bias in (maybe(st.dictionaries(UINT32, FLOATS, max_size=3)) or {}).items():
        sampling.logit_bias[token] = bias
    structured = maybe(STRUCTURED)
    if structured is not None:
        sampling.structured.CopyFrom(structured)
    request = generate_pb2.GenerateRequest(
        request_id=maybe(SHORT),
        model=maybe(SHORT),
        sampling=sampling,
        priority=maybe(st.integers(-200, 200)),
        deadline_ms=maybe(st.sampled_from([1, 50, 1000, (1 << 32) - 1])),
        cache_salt=maybe(SHORT),
        placement=maybe(st.integers(0, 4)),
    )
    beams = maybe(st.tuples(st.none() | FLOATS, st.integers(0, 3), UINT32))
    if beams is not None:
        penalty, early, request.best_of = beams
        request.beam_search.early_stopping = early  # type: ignore[assignment]
        if penalty is not None:
            request.beam_search.length_penalty = penalty
    match draw(st.sampled_from(["text", "token_ids", "chat", "none"])):
        case "text":
            request.text = draw(TEXT)
        case "token_ids":
            request.token_ids.ids.extend(draw(st.lists(UINT32, max_size=20)))
        case "chat":
            request.chat.SetInParent()
            for role, content in draw(st.lists(st.tuples(SHORT, TEXT), max_size=3)):
                message = request.chat.messages.add(role=role, content=content)
                for name, arguments in maybe(st.lists(st.tuples(SHORT, JSON), max_size=2)) or []:
                    message.tool_calls.add(id=name, name=name, arguments_json=arguments)
                message.name = maybe(SHORT) or ""
                message.tool_call_id = maybe(SHORT) or ""
            request.chat.tools_json = maybe(JSON) or ""
            request.chat.chat_template_kwargs_json = maybe(JSON) or ""
    return request


def send(router: InProcessRouter, data: bytes, timeout_s: float = 5.0) -> str:
    """The status that the call ended with; CANCELLED when it was this client that left."""
    call = router.public.unary_stream(GENERATE, response_deserializer=generate_pb2.GenerateResponse.FromString)
    began = time.monotonic()
    reply = Reply()
    left = False
    responses = call(data, timeout=timeout_s)
    try:
        for number, response in enumerate(responses):
            reply.take(response)
            if number == ENOUGH:
                left = True
                responses.cancel()
        status = "OK"
        assert reply.started is not None
        assert reply.finished is not None
        assert reply.finished.usage.completion_tokens == len(reply.token_ids)
    except grpc.RpcError as error:
        status = check_status(error, left)
    assert time.monotonic() - began < timeout_s + 5.0
    return status


def check_status(error: Any, left: bool) -> str:
    code = error.code().name
    if left and code == "CANCELLED":
        return code
    assert code in BAD_INPUT, f"{code}: {error.details()}"
    assert error.details()
    if code == "DEADLINE_EXCEEDED":
        return code  # may be the client's own
    status = rpc_status.from_call(error)
    assert status is not None, f"{code}: {error.details()}: not from the router"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("diptych", code)
    assert "; " in error.details(), f"no fix is named: {error.details()}"
    return code


def check(router: InProcessRouter, data: bytes) -> str:
    status = send(router, data)
    router.answers()
    router.becomes_empty()
    return status


@examples(250)
@given(request=requests())
@example(request=generate_pb2.GenerateRequest(text="hi", model="m" * 100_000))  # did not fit the trailing metadata
@example(request=generate_pb2.GenerateRequest(text="hi", placement=99))  # was taken for AUTO
@example(request=generate_pb2.GenerateRequest(text="\x00" * 5000))
@example(request=generate_pb2.GenerateRequest(text="hi", best_of=4, beam_search=generate_pb2.BeamSearch()))
@example(request=generate_pb2.GenerateRequest(text="hi", best_of=1 << 31, beam_search=generate_pb2.BeamSearch()))
def test_any_request_ends_with_an_answer_or_a_reason(
    router: InProcessRouter, request: generate_pb2.GenerateRequest
) -> None:
    check(router, request.SerializeToString())


@examples(250)
@given(data=st.one_of(st.binary(max_size=200), soup(), mutated(requests().map(lambda r: r.SerializeToString()))))
@example(data=b"\xff")
@example(data=field(3, b"\xed\xa0\x80"))  # a lone surrogate
@example(data=b"\x9b\x06" * 100_000)  # groups without end
@example(data=field(5, b"\x0a\x00" * 1000) * 5)
def test_any_bytes_end_with_an_answer_or_a_reason(router: InProcessRouter, data: bytes) -> None:
    check(router, data)


LIMIT = 1 << 20  # the router's max_prompt_bytes


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (field(5, b"\x0a\x00" * (LIMIT - 99)), "the message has more than 32768 fields"),
        (field(5, b"\x0a\x00" * 5000), "5000 chat messages, the limit is 4096"),
        (field(5, b"\x0a\x03\x0a\x01u" * (LIMIT // 3)), "the message has more than 32768 fields"),
        (field(3, b"hi") + field(6, b"\x3a\x00" * (LIMIT - 99)), "the message has more than 32768 fields"),
        (field(3, b"hi") + field(6, field(8, b"\x01" * LIMIT)), "1048576 stop token ids, the limit is 1024"),
        (field(4, field(1, b"\x01" * LIMIT)), "4194304 bytes, the limit is 1048576"),
        (field(4, field(1, b"\x01" * (LIMIT // 4))), "262144 tokens and the context limit is 8192"),
        (field(3, b"a" * LIMIT), "262144 tokens and the context limit is 8192"),
        (field(3, b"a" * (LIMIT + 1)), "1048577 bytes, the limit is 1048576"),
        (field(5, b"\x0a\x00" * (31 << 20)), "bytes, the limit is 1048576 for prompts"),
        (field(2, b"m" * LIMIT), "is not served here"),
        (field(1, b"m" * LIMIT) + field(3, b"x"), "request_id is not printable ASCII of 1 to 256 bytes"),
        (field(5, field(1, field(1, b"r" * LIMIT))), "a chat role is longer than 64 bytes"),
    ],
)
def test_huge_messages_are_refused_while_others_are_served(router: InProcessRouter, data: bytes, words: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call = router.public.unary_stream(GENERATE)(data, timeout=30)
    began = time.monotonic()
    router.answers()
    assert time.monotonic() - began < 5.0
    with pytest.raises(grpc.RpcError) as refused:
        list(call)
    error: Any = refused.value
    assert check_status(error, left=False) in ("INVALID_ARGUMENT", "NOT_FOUND")
    assert words in error.details()
    router.becomes_empty()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10  # KiB


METADATA = st.lists(
    st.tuples(
        st.sampled_from(["traceparent", "tracestate", "grpc-timeout-x", "x", "x-bin", "baggage"]),
        st.one_of(
            st.sampled_from(["", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "00-zz-1-1", "a=b," * 100, "=" * 500]),
            st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
        ),
    ),
    max_size=4,
)


@examples(60)
@given(metadata=METADATA)
def test_any_metadata_is_taken(router: InProcessRouter, metadata: list[tuple[str, str]]) -> None:
    request = generate_pb2.GenerateRequest(text="hi", sampling=generate_pb2.SamplingParams(max_tokens=1))
    sent = [(key, value.encode() if key.endswith("-bin") else value) for key, value in metadata]
    call = router.public.unary_stream(GENERATE, response_deserializer=generate_pb2.GenerateResponse.FromString)
    kinds = [r.WhichOneof("event") for r in call(request.SerializeToString(), timeout=10, metadata=sent)]
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    router.becomes_empty()


def test_the_seeds_of_this_file_are_what_they_claim(router: InProcessRouter) -> None:
    assert varint(300) == b"\xac\x02"
    assert check(router, generate_pb2.GenerateRequest(text="hi").SerializeToString()) == "CANCELLED"
    one = generate_pb2.GenerateRequest(text="hi", sampling=generate_pb2.SamplingParams(max_tokens=1))
    assert check(router, one.SerializeToString()) == "OK"


@examples(80)
@given(
    emitted=st.lists(st.one_of(st.integers(0, 49151), UINT32), max_size=6),
    max_tokens=st.integers(1, 5),
    stop=st.lists(st.text(min_size=1, max_size=2), max_size=2),
)
@example(emitted=[0] * 5, max_tokens=5, stop=[])  # complete
@example(emitted=[1 << 31], max_tokens=5, stop=[])
def test_emitted_tokens_are_continued_or_refused(
    router: InProcessRouter, emitted: list[int], max_tokens: int, stop: list[str]
) -> None:
    """The answer goes on at the position behind them, and its usage counts them."""
    sampling = generate_pb2.SamplingParams(max_tokens=max_tokens, stop=stop, ignore_eos=True)
    request = generate_pb2.GenerateRequest(text="hi", sampling=sampling, emitted_token_ids=emitted)
    call = router.public.unary_stream(GENERATE, response_deserializer=generate_pb2.GenerateResponse.FromString)
    position = len(emitted)
    try:
        for response in call(request.SerializeToString(), timeout=10):
            if response.tokens.token_ids:
                assert response.tokens.position == position
                position += len(response.tokens.token_ids)
            if response.HasField("finished"):
                assert response.finished.usage.completion_tokens == position <= max_tokens
    except grpc.RpcError as error:
        assert check_status(error, left=False) == "INVALID_ARGUMENT"  # noqa: PT017
    router.becomes_empty()
