"""Several answers to one prompt over gRPC, a fake worker behind the router."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from diptych.inference import open_inference_pb2 as pb
from diptych.inference import open_inference_pb2_grpc
from diptych.v1 import generate_pb2, generate_pb2_grpc

from tests.support.in_process_router import InProcessRouter
from tests.support.raw_http import Http


@pytest.fixture
def stub(running: InProcessRouter, http: Http) -> generate_pb2_grpc.GenerateServiceStub:
    return generate_pb2_grpc.GenerateServiceStub(running.public)


def request(n: int, prompt_tokens: int = 100, **fields: Any) -> generate_pb2.GenerateRequest:
    asked = generate_pb2.GenerateRequest(n=n, sampling=generate_pb2.SamplingParams(max_tokens=5, seed=7), **fields)
    asked.token_ids.ids.extend(range(prompt_tokens))
    return asked


@pytest.mark.parametrize("n", [0, 1, 3, 128])
@pytest.mark.parametrize("prompt_tokens", [3, 100])
def test_every_answer_comes_whole_and_says_whose_it_is(
    stub: generate_pb2_grpc.GenerateServiceStub, n: int, prompt_tokens: int
) -> None:
    """Of a prompt within a block, whose answers share nothing, too."""
    events: dict[int, list[generate_pb2.GenerateResponse]] = defaultdict(list)
    for response in stub.Generate(request(n, prompt_tokens, request_id="a"), timeout=60):
        events[response.answer].append(response)
    assert sorted(events) == list(range(max(1, n)))
    for number, (started, *tokens, finished) in sorted(events.items()):
        assert started.started.request_id == ("a" if number == 0 else f"a-{number}")
        assert started.started.seed == 7 + number
        assert sum(len(t.tokens.token_ids) for t in tokens) == 5
        assert finished.finished.reason == generate_pb2.FINISH_REASON_LENGTH
        usage = finished.finished.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (0 if number else prompt_tokens, 5)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request(129), "n is 129; use 1..128"),
        (request(2, emitted_token_ids=[5]), "resume each answer by itself"),
        (request(2, model="another"), "another"),
        (request(2, best_of=129), "best_of is 129; use n"),
        (request(3, best_of=2), "best_of is 2; use n"),
    ],
)
def test_what_cannot_be_is_refused(
    stub: generate_pb2_grpc.GenerateServiceStub, asked: generate_pb2.GenerateRequest, words: str
) -> None:
    with pytest.raises(grpc.RpcError, match=words):
        list(stub.Generate(asked, timeout=60))


def test_the_best_come_whole(stub: generate_pb2_grpc.GenerateServiceStub, running: InProcessRouter) -> None:
    before = running.router.dispatcher.tokens_total
    responses = list(stub.Generate(request(2, best_of=6), timeout=60))
    assert [r.answer for r in responses] == [0, 0, 0, 1, 1, 1]
    assert [r.WhichOneof("event") for r in responses] == ["started", "tokens", "finished"] * 2
    assert running.router.dispatcher.tokens_total == before + 6 * 5
    usages = [r.finished.usage for r in responses if r.HasField("finished")]
    assert [(u.prompt_tokens, u.completion_tokens) for u in usages] == [(100, 5 * 5), (0, 5)]


def test_a_session_says_what_to_do_instead(stub: generate_pb2_grpc.GenerateServiceStub) -> None:
    def starts() -> Iterator[generate_pb2.SessionRequest]:
        start = generate_pb2.StartRequest(handle=1, request=request(2))
        yield generate_pb2.SessionRequest(starts=[start])

    (event,) = next(iter(stub.Session(starts(), timeout=60))).events
    assert "start a request for each answer" in event.error.message


def inferred(running: InProcessRouter, n: int, *, stream: bool = False) -> Any:
    asked = pb.ModelInferRequest(model_name=running.router.dispatcher.model_name, id="a")
    asked.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"hi " * 200)
    parameters = f'{{"n": {n}, "max_tokens": 5, "seed": 1}}'.encode()
    asked.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1]).contents.bytes_contents.append(parameters)
    asked.inputs.add(name="return_num_output_tokens", datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
    asked.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(stream)
    return asked


@pytest.mark.parametrize("n", [1, 3])
def test_open_inference_gives_an_element_for_each(running: InProcessRouter, http: Http, n: int) -> None:
    stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(running.public)
    answer = stub.ModelInfer(inferred(running, n), timeout=60)
    assert [o.name for o in answer.outputs] == ["text_output", "finish_reason", "num_output_tokens"]
    assert all(list(o.shape) == [n] for o in answer.outputs)
    assert answer.raw_output_contents[1] == b"\x06\0\0\0length" * n
    assert answer.raw_output_contents[2] == b"\x05\0\0\0" * n


def test_open_inference_does_not_stream_them(running: InProcessRouter, http: Http) -> None:
    stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(running.public)
    for stream, words in ((True, "set 'stream' to false"), (False, "call ModelInfer")):
        (said,) = stub.ModelStreamInfer(iter([inferred(running, 2, stream=stream)]), timeout=60)
        assert words in said.error_message


def test_a_call_that_is_cancelled_ends_all_of_them(
    stub: generate_pb2_grpc.GenerateServiceStub, running: InProcessRouter
) -> None:
    asked = request(20)
    asked.sampling.max_tokens = 4000
    call = stub.Generate(asked, timeout=60)
    next(call)
    call.cancel()
    running.becomes_empty()
