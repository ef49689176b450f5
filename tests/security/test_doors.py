"""Who gets in at the public ports, and what they can do there."""

from __future__ import annotations

import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from typing import Any

import grpc
import pytest
from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2, generate_pb2_grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from deploy.access import Access
from deploy.certificates import Authority
from tests.support.processes import Cluster, Reply
from tests.support.secure import Secured

PROMPT = list(range(100, 200))
FEW = generate_pb2.SamplingParams(max_tokens=3, ignore_eos=True)
SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL


def ask(cluster: Cluster, access: Access, prompt: list[int] = PROMPT, sampling: Any = FEW, **fields: Any) -> Reply:
    with access.channel(cluster.target, []) as channel:
        stub, reply = generate_pb2_grpc.GenerateServiceStub(channel), Reply()
        for response in stub.Generate(cluster.request(prompt, sampling, **fields), timeout=60):
            reply.take(response)
        return reply


def refused(cluster: Cluster, access: Access, **fields: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        ask(cluster, access, **fields)
    return caught.value


def eventually(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def admitted(cluster: Cluster, access: Access) -> bool:
    """Routers follow the key file within a second or two."""
    with access.channel(cluster.target, []) as channel:
        try:
            list(generate_pb2_grpc.GenerateServiceStub(channel).Generate(cluster.request([1], FEW), timeout=30))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise
            return False
        return True


@pytest.fixture(scope="module")
def acme(shared: Cluster, secured: Secured) -> Access:
    access = secured.add_key("acme", max_priority=5)
    eventually(lambda: admitted(shared, access))
    return access


@pytest.fixture(scope="module")
def rival(shared: Cluster, secured: Secured) -> Access:
    access = secured.add_key("rival")
    eventually(lambda: admitted(shared, access))
    return access


def test_a_split_and_a_local_answer_agree_over_tls(cluster: Cluster, acme: Access) -> None:
    split = ask(cluster, acme, placement=SPLIT, cache_salt="one")
    local = ask(cluster, acme, placement=LOCAL, cache_salt="two")
    assert split.split
    assert not local.split
    assert split.finished.recoveries == 0
    assert split.token_ids == local.token_ids
    assert len(split.token_ids) == 3


@pytest.mark.parametrize("key", ["", "x", "dpt_000000000000_" + "A" * 43, "Bearer", "ä", "a" * 4000])
def test_bad_keys(cluster: Cluster, secured: Secured, key: str) -> None:
    if not key.isascii():
        with pytest.raises(Exception):  # noqa: B017  gRPC itself refuses to send it
            ask(cluster, secured.access(key))
        return
    error = refused(cluster, secured.access(key))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "; " in error.details()


def test_expired_and_revoked_keys(cluster: Cluster, secured: Secured) -> None:
    short = secured.add_key("acme", expires="2026-01-01T00:00:00Z")
    brief = secured.add_key("acme")
    eventually(lambda: admitted(cluster, brief))
    assert "expired" in refused(cluster, short).details()
    with brief.channel(cluster.target, []) as channel:  # a session that was opened with a good key
        asked: list[generate_pb2.SessionRequest] = []

        def start(handle: int) -> generate_pb2.SessionRequest:
            one = generate_pb2.StartRequest(handle=handle, request=cluster.request([1], FEW))
            return generate_pb2.SessionRequest(starts=[one])

        def requests() -> Any:
            sent = 0
            while True:
                while sent == len(asked):
                    time.sleep(0.01)
                if asked[sent] is None:
                    return
                yield asked[sent]
                sent += 1

        asked.append(start(1))
        answers = generate_pb2_grpc.GenerateServiceStub(channel).Session(requests(), timeout=60)
        events = (e for r in answers for e in r.events)
        assert next(e for e in events if e.WhichOneof("event") == "finished").handle == 1
        secured.revoke(brief)
        eventually(lambda: not admitted(cluster, brief))
        asked.append(start(2))
        error = next(e for e in events if e.handle == 2).error
        asked.append(None)  # type: ignore[arg-type]
        assert error.code == grpc.StatusCode.UNAUTHENTICATED.value[0]
        assert "revoked" in error.message


def test_a_key_file_that_is_broken_keeps_the_last_keys(cluster: Cluster, secured: Secured, acme: Access) -> None:
    good = secured.key_file.read_bytes()
    secured.key_file.write_text("keys: [")
    try:
        eventually(lambda: "The keys read before stay in force" in cluster.logs())
        assert admitted(cluster, acme)
    finally:
        secured.key_file.write_bytes(good)


def test_limits_of_a_key_answer_with_a_retry_hint(cluster: Cluster, secured: Secured, acme: Access) -> None:
    few = secured.add_key("acme", requests_per_minute=2)
    small = secured.add_key("acme", tokens_per_minute=150, models=(cluster.model.name,))
    other = secured.add_key("acme", models=("another-model",))
    eventually(lambda: admitted(cluster, small))
    ask(cluster, few)
    ask(cluster, few)
    error = refused(cluster, few)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 0 < retry_s(error) <= 31
    ask(cluster, small)
    error = refused(cluster, small)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 0 < retry_s(error) <= 60
    assert "tokens a minute" in error.details()
    assert refused(cluster, other).code() is grpc.StatusCode.PERMISSION_DENIED
    assert refused(cluster, acme, priority=6).code() is grpc.StatusCode.PERMISSION_DENIED
    ask(cluster, acme, priority=5)


def retry_s(error: Any) -> float:
    for detail in rpc_status.from_call(error).details:
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return info.retry_delay.ToTimedelta().total_seconds()
    raise AssertionError("no retry hint")


def test_tenants_share_no_cache_whatever_salt_they_send(cluster: Cluster, acme: Access, rival: Access) -> None:
    prompt = list(range(1000, 1100))
    for placement in (LOCAL, SPLIT):
        ask(cluster, acme, prompt, placement=placement)
        assert ask(cluster, acme, prompt, placement=placement).finished.usage.cached_tokens > 0
        for salt in ("", "acme", "+4:acme", "4:acme", "-"):
            probe = ask(cluster, rival, prompt, placement=placement, cache_salt=salt)
            assert probe.finished.usage.cached_tokens == 0, salt
        prompt = [9, *prompt]


def test_request_ids_of_tenants_never_meet(cluster: Cluster, acme: Access, rival: Access) -> None:
    long = generate_pb2.SamplingParams(max_tokens=200, ignore_eos=True)
    with acme.channel(cluster.target, []) as one, rival.channel(cluster.target, []) as other:
        ours = generate_pb2_grpc.GenerateServiceStub(one).Generate(
            cluster.request(PROMPT, long, request_id="same"), timeout=60
        )
        assert next(ours).started.request_id == "same"
        theirs = generate_pb2_grpc.GenerateServiceStub(other).Generate(
            cluster.request(PROMPT, long, request_id="same"), timeout=60
        )
        assert next(theirs).started.request_id == "same"
        error = refused(cluster, acme, request_id="same")
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        theirs.cancel()
        assert next(ours).WhichOneof("event") == "tokens"
        ours.cancel()


def test_only_an_admin_sees_the_cluster(cluster: Cluster, acme: Access) -> None:
    with acme.channel(cluster.target, []) as channel:
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.WatchCluster(cluster_pb2.WatchClusterRequest(), timeout=10))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert cluster.cluster().router.serving


# HTTP.


def http(
    cluster: Cluster, secured: Secured, path: str, access: Access | None = None, body: Any = None
) -> tuple[int, Any]:
    context = ssl.create_default_context(cadata=secured.ca.decode())
    headers = {"authorization": f"Bearer {access.api_key}"} if access else {}
    request = urllib.request.Request(f"https://127.0.0.1:{cluster.http_port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, context=context, timeout=20) as response:
            return response.status, json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"null")


def test_http_asks_for_the_key_too(cluster: Cluster, secured: Secured, acme: Access) -> None:
    assert http(cluster, secured, "/health") == (200, {"status": "ok"})
    status, body = http(cluster, secured, "/v1/models")
    assert status == 401
    assert body["error"]["code"] == "invalid_api_key"
    assert http(cluster, secured, "/v1/models", secured.access("dpt_no_such"))[0] == 401
    status, body = http(cluster, secured, "/v1/models", acme)
    assert status == 200
    assert body["data"]
    for path in ("/metrics", "/ui/cluster", "/ui/scaling"):
        assert http(cluster, secured, path, acme)[0] == 403


@pytest.mark.parametrize(
    "path", ["/v1/models/../../etc/passwd", "/v1/models/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/v1/models/a%00b"]
)
def test_path_tricks_over_http(cluster: Cluster, secured: Secured, acme: Access, path: str) -> None:
    status, body = http(cluster, secured, path, acme)
    assert status in (400, 404)
    assert "root:" not in json.dumps(body)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\0b", "file:///etc/passwd", "x" * 100_000])
def test_a_model_is_a_name_never_a_path(cluster: Cluster, acme: Access, name: str) -> None:
    assert refused(cluster, acme, model=name).code() is grpc.StatusCode.NOT_FOUND


# TLS.


def test_plain_text_to_a_tls_port_ends_cleanly(cluster: Cluster) -> None:
    for port in (cluster.port, cluster.internal_port, cluster.http_port):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
            s.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            said = b""
            while part := receive(s):
                said += part
            assert len(said) < 200, "an alert at most"
    with grpc.insecure_channel(cluster.target) as channel, pytest.raises(grpc.RpcError) as caught:
        list(generate_pb2_grpc.GenerateServiceStub(channel).Generate(cluster.request(PROMPT, FEW), timeout=10))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def receive(s: socket.socket) -> bytes:
    try:
        return s.recv(4096)
    except ConnectionError:
        return b""


def test_a_client_that_trusts_another_authority_sends_nothing(cluster: Cluster, acme: Access, tmp_path: Any) -> None:
    Authority("other-ca", tmp_path, 30)
    wrong = Access(ca=(tmp_path / "other-ca.crt").read_bytes(), api_key=acme.api_key)
    assert refused(cluster, wrong).code() is grpc.StatusCode.UNAVAILABLE


def test_a_new_certificate_is_taken_without_a_restart(cluster: Cluster, secured: Secured) -> None:
    before = served_certificates(cluster)
    Authority("public-ca", secured.directory, 30).issue("public", ["localhost", "127.0.0.1"])
    eventually(lambda: all(a != b for a, b in zip(before, served_certificates(cluster), strict=True)))
    assert cluster.cluster().router.serving


def served_certificates(cluster: Cluster) -> list[str]:
    return [ssl.get_server_certificate(("127.0.0.1", port), timeout=10) for port in (cluster.port, cluster.http_port)]
