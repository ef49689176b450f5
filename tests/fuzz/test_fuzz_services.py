"""The smaller services, given anything: an answer, or INVALID_ARGUMENT and its like; never UNKNOWN, never INTERNAL."""

from __future__ import annotations

import time
from typing import Any

import grpc
import pytest
from diptych.inference import open_inference_pb2
from diptych.v1 import admin_pb2, cluster_pb2, scaling_pb2, worker_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.fuzz import examples
from tests.support.in_process_router import InProcessRouter
from tests.support.wire_bytes import mutated, soup

GET, WATCH = "/diptych.v1.ClusterService/GetCluster", "/diptych.v1.ClusterService/WatchCluster"
TELL_SCALING, GET_SCALING = "/diptych.v1.AdminService/TellScaling", "/diptych.v1.ClusterService/GetScaling"
CHECK, HEALTH_WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
INFER, STREAM_INFER = "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer"
REGISTER = "/diptych.v1.RegistryService/Register"

NAMES = st.one_of(
    st.sampled_from(
        ["", "\0", "diptych.v1.GenerateService", "diptych.v1.Nope", "diptych/v1/generate.proto", "x" * 20_000]
    ),
    st.text(max_size=30),
)
WATCHES = st.integers(0, (1 << 32) - 1).map(lambda ms: cluster_pb2.WatchClusterRequest(interval_ms=ms))
REFLECTIONS = st.one_of(
    *(
        st.builds(reflection_pb2.ServerReflectionRequest, **{name: NAMES})
        for name in ("file_by_filename", "file_containing_symbol", "all_extension_numbers_of_type", "list_services")
    ),
    st.builds(
        lambda name, number: reflection_pb2.ServerReflectionRequest(
            file_containing_extension=reflection_pb2.ExtensionRequest(containing_type=name, extension_number=number)
        ),
        NAMES,
        st.integers(-(1 << 31), (1 << 31) - 1),
    ),
)


def serialized(messages: Any) -> Any:
    return messages.map(lambda m: m.SerializeToString())


HEALTH_CHECKS = serialized(st.builds(health_pb2.HealthCheckRequest, service=NAMES))
ANYTHING = st.one_of(
    st.binary(max_size=60), soup(), mutated(serialized(st.one_of(WATCHES, REFLECTIONS))), mutated(HEALTH_CHECKS)
)


def status_of(channel: grpc.Channel, method: str, data: bytes, *, stream: bool = False) -> str:
    """Of a call from which one response is taken."""
    made: Any = channel.stream_stream(method) if stream else channel.unary_stream(method)
    call = made(iter([data]) if stream else data, timeout=5)
    began = time.monotonic()
    try:
        next(call, None)
        call.cancel()
        return "OK"
    except grpc.RpcError:
        pass
    assert time.monotonic() - began < 5.0
    if call.code().name == "INVALID_ARGUMENT":
        assert "; " in call.details()
    return call.code().name


@examples(120)
@given(data=st.one_of(ANYTHING, serialized(WATCHES)))
@example(data=b"\xff")
def test_cluster_service(router: InProcessRouter, data: bytes) -> None:
    for method in (GET, WATCH):
        assert status_of(router.public, method, data) in ("OK", "INVALID_ARGUMENT")


DECISIONS = st.builds(
    lambda decision: admin_pb2.TellScalingRequest(decision=decision),
    st.builds(
        scaling_pb2.ScalingDecision,
        decider=NAMES,
        number=st.integers(0, 3),
        age_ms=st.floats(),
        interval_s=st.one_of(st.just(5.0), st.floats()),
        rule=NAMES,
        error=NAMES,
        outcome=st.integers(0, 5),
        numbers=st.dictionaries(NAMES, st.floats(), max_size=3),
        alternatives=st.lists(st.builds(scaling_pb2.ScalingAlternative, takes_s=st.floats(), what=NAMES), max_size=2),
    ),
)


@examples(120)
@given(data=st.one_of(ANYTHING, serialized(DECISIONS), mutated(serialized(DECISIONS))))
@example(data=b"\xff")
def test_scaling_decisions(router: InProcessRouter, data: bytes) -> None:
    """Whatever was taken can be read."""
    assert status_of(router.public, TELL_SCALING, data) in ("OK", "INVALID_ARGUMENT")
    assert status_of(router.public, GET_SCALING, data) in ("OK", "INVALID_ARGUMENT")
    assert status_of(router.public, GET_SCALING, b"") == "OK"


@examples(120)
@given(data=st.one_of(ANYTHING, HEALTH_CHECKS))
@example(data=b"\x0a\x01\xff")
def test_health(router: InProcessRouter, data: bytes) -> None:
    assert status_of(router.public, CHECK, data) in ("OK", "INVALID_ARGUMENT", "NOT_FOUND")
    assert status_of(router.public, HEALTH_WATCH, data) in ("OK", "INVALID_ARGUMENT")
    assert status_of(router.public, CHECK, b"") == "OK"


@examples(120)
@given(data=st.one_of(ANYTHING, serialized(REFLECTIONS)))
@example(data=b"\x1a\x01\xff")
def test_reflection(router: InProcessRouter, data: bytes) -> None:
    assert status_of(router.public, REFLECT, data, stream=True) in ("OK", "INVALID_ARGUMENT")


REGISTRATIONS = st.builds(
    worker_pb2.RegisterRequest,
    worker_id=NAMES,
    epoch=st.integers(0, (1 << 64) - 1),
    role=st.integers(-1, 3),
    address=NAMES,
    model=NAMES,
    block_tokens=st.integers(0, 2),
    vocab_size=st.integers(0, 1),
    leaving=st.booleans(),
)


@examples(120)
@given(data=st.one_of(ANYTHING, serialized(REGISTRATIONS), mutated(serialized(REGISTRATIONS))))
@example(data=b"\xff")
def test_registry_takes_no_worker_that_cannot_be_one(router: InProcessRouter, data: bytes) -> None:
    assert status_of(router.internal, REGISTER, data) in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
    router.answers()


def test_a_registration_without_blocks_is_refused(router: InProcessRouter) -> None:
    """It would fail every later request with a division by zero."""
    request = worker_pb2.RegisterRequest(
        worker_id="w",
        role=cluster_pb2.ROLE_DECODE,
        address="127.0.0.1:1",
        model=router.router.dispatcher.model_name,
        total_blocks=1,
        context_limit_tokens=1,
        vocab_size=1,
    )
    assert status_of(router.internal, REGISTER, request.SerializeToString()) == "INVALID_ARGUMENT"


def test_methods_that_do_not_exist(router: InProcessRouter) -> None:
    for method in ("/nope/x", "/diptych.v1.ClusterService/Nope", "/diptych.v1.GenerateService/generate"):
        assert status_of(router.public, method, b"") == "UNIMPLEMENTED"


def tensor(name: str, datatype: str, **contents: list[object]) -> open_inference_pb2.ModelInferRequest.InferInputTensor:
    values = next(iter(contents.values()))
    made = open_inference_pb2.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=[len(values)])
    getattr(made.contents, next(iter(contents))).extend(values)
    return made


def infer_request(tensors: list[object]) -> open_inference_pb2.ModelInferRequest:
    return open_inference_pb2.ModelInferRequest(model_name="smollm2-135m-instruct", inputs=tensors)  # type: ignore[arg-type]


TENSORS = st.one_of(
    st.builds(
        tensor, st.just("text_input"), st.just("BYTES"), bytes_contents=st.lists(st.binary(max_size=9), max_size=2)
    ),
    st.builds(
        tensor, st.just("stream"), st.just("BOOL"), bool_contents=st.lists(st.booleans(), min_size=1, max_size=1)
    ),
    st.builds(tensor, st.just("max_tokens"), st.just("INT32"), int_contents=st.lists(st.integers(-1, 4), max_size=2)),
    st.builds(tensor, NAMES, st.sampled_from(["BYTES", "FP32", "FP16", ""]), fp32_contents=st.just([1.0])),
)
INFERS = st.lists(TENSORS, max_size=4).map(infer_request)


@examples(120)
@given(data=st.one_of(ANYTHING, serialized(INFERS), mutated(serialized(INFERS))))
@example(data=b"\x0a\x01\xff")
def test_open_inference(router: InProcessRouter, data: bytes) -> None:
    known = ("OK", "INVALID_ARGUMENT", "NOT_FOUND")
    assert status_of(router.public, INFER, data) in known
    assert status_of(router.public, STREAM_INFER, data, stream=True) in known
    router.becomes_empty()


def test_a_stream_ends_its_requests_when_the_client_has_sent_its_last(router: InProcessRouter) -> None:
    """Half-close is not cancel: Triton's stop_stream waits. A cancelled stream cancels."""
    model = router.router.dispatcher.model_name
    request = open_inference_pb2.ModelInferRequest(
        model_name=model,
        id="a",
        inputs=[
            tensor("text_input", "BYTES", bytes_contents=[b"hello"]),
            tensor("stream", "BOOL", bool_contents=[True]),
            tensor("max_tokens", "INT32", int_contents=[50]),
        ],
    )
    call = router.public.stream_stream(
        STREAM_INFER,
        request_serializer=open_inference_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=open_inference_pb2.ModelStreamInferResponse.FromString,
    )
    responses = [r.infer_response for r in call(iter([request, request]), timeout=20)]
    finals = [r.parameters["triton_final_response"].bool_param for r in responses]
    assert finals.count(True) == 2
    assert finals[-1]
    request.inputs[2].contents.int_contents[0] = 8000
    cancelled = call(iter([request]), timeout=20)
    next(cancelled)
    cancelled.cancel()
    router.becomes_empty()


def test_tritons_metadata_key_turns_an_error_into_the_streams_status(router: InProcessRouter) -> None:
    made = router.public.stream_stream(STREAM_INFER)
    call = made(iter([infer_request([]).SerializeToString()]), metadata=(("triton_grpc_error", "true"),), timeout=10)
    with pytest.raises(grpc.RpcError):
        next(call)
    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "text_input" in call.details()
