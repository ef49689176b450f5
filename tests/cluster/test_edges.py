"""What a client sees when something is off: a clear error or a working answer, and nothing left behind."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2
from google.rpc import code_pb2, error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status

from tests.support.processes import Cluster
from tests.support.prompts import tokens_of
from tests.support.tiers import tiered

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL


def sampling(**values: Any) -> generate_pb2.SamplingParams:
    return generate_pb2.SamplingParams(**values)


def refused(cluster: Cluster, request: generate_pb2.GenerateRequest) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        cluster.ask(request)
    return error.value


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"text": ""}, "INVALID_ARGUMENT", "empty"),
        ({}, "INVALID_ARGUMENT", "no prompt"),
        ({"text": "hi", "model": "gpt-9"}, "NOT_FOUND", "smollm2-135m-instruct"),
        ({"text": "hi", "sampling": sampling(max_tokens=0)}, "INVALID_ARGUMENT", "max_tokens is 0"),
        ({"text": "hi", "sampling": sampling(temperature=-1)}, "INVALID_ARGUMENT", "temperature is -1"),
        ({"token_ids": generate_pb2.TokenIds(ids=[49152])}, "INVALID_ARGUMENT", "vocabulary of 49152"),
        ({"token_ids": generate_pb2.TokenIds(ids=[1] * 8192)}, "INVALID_ARGUMENT", "context limit is 8192"),
        ({"text": "x" * (10 << 20)}, "INVALID_ARGUMENT", "bytes, the limit is 4194304 for prompts"),
        ({"text": "hi", "sampling": sampling(max_tokens=9000)}, "INVALID_ARGUMENT", "ask for at most"),
        ({"chat": generate_pb2.ChatMessages()}, "INVALID_ARGUMENT", "no messages"),
    ],
)
def test_bad_requests_are_refused_with_cause_and_fix(
    cluster: Cluster, fields: dict[str, Any], code: str, words: str
) -> None:
    error: Any = refused(cluster, generate_pb2.GenerateRequest(**fields))
    assert error.code().name == code
    assert words in error.details()
    status = rpc_status.from_call(error)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("diptych", code)
    assert status.code == code_pb2.Code.Value(code)


def test_invalid_utf8_is_named_not_an_internal_error(cluster: Cluster) -> None:
    raw = cluster.channel.unary_stream("/diptych.v1.GenerateService/Generate")
    with pytest.raises(grpc.RpcError) as error:
        list(raw(b"\x1a\x02\xff\xfe", timeout=10))  # field 3 (text), two bytes that are no UTF-8
    assert error.value.code().name == "INVALID_ARGUMENT"  # type: ignore[attr-defined]
    assert "UTF-8" in error.value.details()  # type: ignore[attr-defined]


def test_a_live_request_id_cannot_be_used_twice(cluster: Cluster) -> None:
    first = cluster.stream(
        cluster.request("hello", sampling(max_tokens=200, ignore_eos=True), LOCAL, request_id="mine")
    )
    next(first)
    error: Any = refused(cluster, cluster.request("hello", request_id="mine"))
    assert error.code().name == "ALREADY_EXISTS"
    first.cancel()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"request_id": "a\nb"}, "printable ASCII"),
        ({"sampling": sampling(top_k=1 << 31)}, "top_k is 2147483648; use a whole number in [0, 2147483647]"),
    ],
)
def test_what_another_door_refuses_is_refused_here_too(cluster: Cluster, more: dict[str, Any], words: str) -> None:
    error: Any = refused(cluster, cluster.request("hello", **more))
    assert error.code().name == "INVALID_ARGUMENT"
    assert words in error.details()


@pytest.mark.parametrize("placement", [SPLIT, LOCAL])
@pytest.mark.parametrize("tokens_before", tiered([0, 5], [1]))
def test_a_client_that_leaves_frees_everything(
    cluster: Cluster, tokenizer: Any, placement: int, tokens_before: int
) -> None:
    prompt = tokens_of(tokenizer, 700, seed=50 + tokens_before)
    call = cluster.stream(cluster.request(prompt, sampling(max_tokens=500, ignore_eos=True), placement))
    seen = 0
    for response in call:
        seen += len(response.tokens.token_ids)
        if seen >= tokens_before:
            break
    call.cancel()
    cluster.assert_nothing_left(timeout_s=10.0)


def test_the_deadline_is_kept_and_explained(cluster: Cluster) -> None:
    for deadline_ms in (700, 1400, 2800):
        request = cluster.request("hello", sampling(max_tokens=2000, ignore_eos=True), LOCAL, deadline_ms=deadline_ms)
        begun = time.monotonic()
        error: Any = refused(cluster, request)
        if "the answer would take about" not in error.details():
            break  # else the machine is so slow that it was not even tried
    assert error.code().name == "DEADLINE_EXCEEDED", error.details()
    assert "tokens were sent" in error.details()
    assert time.monotonic() - begun < deadline_ms / 1e3 + 4.0


class Session:
    """A client with many requests on one stream."""

    def __init__(self, cluster: Cluster) -> None:
        self._out: queue.Queue[generate_pb2.SessionRequest | None] = queue.Queue()
        self.tokens: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.started: dict[int, Any] = {}
        self.ends: dict[int, Any] = {}
        self.call = cluster.session(self._requests())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _requests(self) -> Iterator[generate_pb2.SessionRequest]:
        while (message := self._out.get()) is not None:
            yield message

    def _read(self) -> None:
        try:
            for response in self.call:
                columns = (response.handles, response.positions, response.token_ids, response.texts)
                for handle, position, token, text in zip(*columns, strict=True):
                    tokens = self.tokens.setdefault(handle, [])
                    assert position == len(tokens)
                    assert handle not in self.ends
                    tokens.append(token)
                    self.texts[handle] = self.texts.get(handle, "") + text
                for event in response.events:
                    match event.WhichOneof("event"):
                        case "started":
                            self.started[event.handle] = event.started
                        case "tokens":
                            self.tokens.setdefault(event.handle, []).extend(event.tokens.token_ids)
                            self.texts[event.handle] = self.texts.get(event.handle, "") + event.tokens.text
                        case kind:
                            self.ends[event.handle] = getattr(event, kind)
        except grpc.RpcError:
            pass

    def send(self, *starts: generate_pb2.StartRequest, cancel: tuple[int, ...] = ()) -> None:
        cancels = [generate_pb2.CancelRequest(handle=h) for h in cancel]
        self._out.put(generate_pb2.SessionRequest(starts=starts, cancels=cancels))

    def wait(self, *handles: int) -> None:
        deadline = time.monotonic() + 60
        while not all(h in self.ends for h in handles):
            assert time.monotonic() < deadline, f"ended: {self.ends.keys()}"
            time.sleep(0.01)

    def close(self) -> None:
        self._out.put(None)
        self._thread.join(10)


def test_a_session_answers_as_generate_does(cluster: Cluster, tokenizer: Any) -> None:
    prompts = {h: tokens_of(tokenizer, 20 + 60 * h, seed=h) for h in range(1, 6)}
    params = sampling(max_tokens=8)
    single = {h: cluster.ask(cluster.request(p, params, LOCAL)) for h, p in prompts.items()}
    session = Session(cluster)
    session.send(
        *(
            generate_pb2.StartRequest(handle=h, request=cluster.request(p, params, SPLIT if h % 2 else LOCAL))
            for h, p in prompts.items()
        )
    )
    session.wait(*prompts)
    for h, reply in single.items():
        assert session.tokens[h] == reply.token_ids
        assert session.texts[h] == reply.text
        assert session.ends[h].usage.completion_tokens == len(reply.token_ids)
        assert session.started[h].prompt_tokens == len(prompts[h])
    session.close()


def test_a_session_reports_errors_per_request_and_cancels(cluster: Cluster) -> None:
    session = Session(cluster)
    endless = cluster.request("hello", sampling(max_tokens=3000, ignore_eos=True), LOCAL)
    session.send(
        generate_pb2.StartRequest(handle=1, request=endless),
        generate_pb2.StartRequest(handle=2, request=cluster.request("")),
        generate_pb2.StartRequest(handle=3, request=cluster.request("hi", sampling(max_tokens=2))),
    )
    session.wait(2, 3)
    assert session.ends[2].code == code_pb2.INVALID_ARGUMENT
    assert "empty" in session.ends[2].message
    assert len(session.tokens[3]) == 2
    session.send(cancel=(1,))
    session.wait(1)
    assert session.ends[1].reason == generate_pb2.FINISH_REASON_CANCELLED
    session.close()


def test_the_end_of_a_session_ends_its_requests(cluster: Cluster) -> None:
    session = Session(cluster)
    endless = cluster.request("hello", sampling(max_tokens=3000, ignore_eos=True), LOCAL)
    session.send(*(generate_pb2.StartRequest(handle=h, request=endless) for h in (1, 2)))
    deadline = time.monotonic() + 20
    while len(session.tokens) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    session.call.cancel()
    cluster.assert_nothing_left()
    session.close()


def test_status_shows_pools_and_routes(cluster: Cluster) -> None:
    reply = cluster.ask(cluster.request("hello", sampling(max_tokens=2), request_id="seen"))
    state = cluster.cluster()
    assert state.router.serving
    assert state.router.context_limit_tokens == 8192
    by_role = {w.role: w for w in state.workers}
    decode = by_role[cluster_pb2.ROLE_DECODE]
    assert decode.load.total_blocks == 512
    assert decode.load.prefill_tokens_per_s > 0, "measured in the warm-up already"
    assert "nixl" in decode.transport
    assert "float32" in decode.device
    seen = next(r for r in state.recent if r.request_id == "seen")
    assert (seen.outcome, seen.completion_tokens) == ("length", 2)
    assert seen.route.rule == reply.started.route.rule
    watch = cluster_pb2_grpc.ClusterServiceStub(cluster.channel).WatchCluster(
        cluster_pb2.WatchClusterRequest(interval_ms=100), timeout=10
    )
    assert len(list(itertools.islice(watch, 2))) == 2
    watch.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_names_and_describes_the_services(cluster: Cluster, version: str) -> None:
    reflect = cluster.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflect(iter([request]), timeout=10)
    names = [s.name for s in answer.list_services_response.service]
    assert {"diptych.v1.GenerateService", "diptych.v1.ClusterService", "grpc.health.v1.Health"} <= set(names)
    assert {"inference.GRPCInferenceService", "grpc.reflection.v1.ServerReflection"} <= set(names)
    requests = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names]
    for name, described in zip(names, reflect(iter(requests), timeout=10), strict=True):
        assert described.file_descriptor_response.file_descriptor_proto, name


def test_health_knows_the_services_that_answer(cluster: Cluster) -> None:
    stub: Any = health_pb2_grpc.HealthStub(cluster.channel)
    for name in ("", "diptych.v1.GenerateService", "inference.GRPCInferenceService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as refused:
        stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=10)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
