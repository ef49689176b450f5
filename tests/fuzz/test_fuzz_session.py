"""Session, used in any order: every start ends exactly once, or the session does; nothing stays live."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.v1 import generate_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from router.config import RouterConfig
from tests.support.fuzz import examples
from tests.support.in_process_router import SESSION, InProcessRouter
from tests.support.wire_bytes import field, soup, varint

HANDLES = st.sampled_from([0, 1, 2, (1 << 32) - 1])


def request(**fields: Any) -> generate_pb2.GenerateRequest:
    sampling = generate_pb2.SamplingParams(max_tokens=fields.pop("max_tokens", 3))
    return generate_pb2.GenerateRequest(sampling=sampling, **fields)


LONG = 4000  # tokens: ends by a cancel, or with the session
REQUESTS = {
    "good": request(text="hi"),
    "logprobs": request(token_ids=generate_pb2.TokenIds(ids=[1, 2])),
    "one": request(text="hi", max_tokens=1),
    "tokenized beside the loop": request(text="word " * 1500),
    "long": request(text="hi", max_tokens=LONG),
    "same id": request(text="hi", request_id="same", max_tokens=40),
    "empty": generate_pb2.GenerateRequest(),
    "too long": request(text="hi", max_tokens=1 << 31),
    "no such model": request(text="hi", model="m" * 3000),
    "late": request(text="hi", deadline_ms=1, max_tokens=LONG),
}
STARTS = st.tuples(st.just("start"), HANDLES, st.sampled_from(sorted(REQUESTS)))
CANCELS = st.tuples(st.just("cancel"), HANDLES)
MESSAGES = st.lists(st.one_of(STARTS, CANCELS), max_size=6)
STEPS = st.lists(st.one_of(MESSAGES, MESSAGES, st.just("settle"), st.just("pause")), max_size=6)
ENDS = st.sampled_from(["half-close", "disconnect", "settle", "settle", "settle"])


class Client:
    """One session. Every response is read at once and looked at."""

    def __init__(self, router: InProcessRouter) -> None:
        self.started: Counter[int] = Counter()  # asked for, by handle
        self.ended: Counter[int] = Counter()  # finished or error
        self.positions: dict[int, list[int]] = {}
        self.errors: list[generate_pb2.SessionError] = []
        self.problem: str = ""
        self.over = threading.Event()
        self._changed = threading.Condition()
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stub = router.public.stream_stream(SESSION, response_deserializer=generate_pb2.SessionResponse.FromString)
        self.call: Any = stub(iter(self._out.get, None), timeout=30)
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: generate_pb2.SessionRequest) -> None:
        self.started.update(s.handle for s in message.starts)
        self.send_bytes(message.SerializeToString())

    def send_bytes(self, data: bytes) -> None:
        self._out.put(data)

    def half_close(self) -> None:
        self._out.put(None)

    def settle(self, timeout_s: float = 10.0) -> None:
        """Until every start has ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.ended == self.started or self.over.is_set(), timeout_s), (
                f"started {self.started}, ended {self.ended}"
            )

    def _read(self) -> None:
        try:
            for response in self.call:
                with self._changed:
                    self._take(response)
                    self._changed.notify_all()
        except grpc.RpcError:
            pass  # the test looks at the call
        except AssertionError as error:
            self.problem = repr(error)
        self.over.set()
        with self._changed:
            self._changed.notify_all()

    def _take(self, response: generate_pb2.SessionResponse) -> None:
        columns = (response.handles, response.positions, response.token_ids, response.texts)
        assert len({len(column) for column in columns}) == 1
        for handle, position in zip(response.handles, response.positions, strict=True):
            self.positions.setdefault(handle, []).append(position)
        for event in response.events:
            assert event.handle in self.started
            match event.WhichOneof("event"):
                case "finished":
                    self.ended[event.handle] += 1
                case "error":
                    assert "; " in event.error.message, f"no fix is named: {event.error.message}"
                    self.errors.append(event.error)
                    self.ended[event.handle] += 1
            assert self.ended[event.handle] <= self.started[event.handle]


@pytest.fixture
def client(router: InProcessRouter) -> Iterator[Client]:
    one = Client(router)
    yield one
    one.call.cancel()


@pytest.fixture
def quiet_router(model_path: Path) -> Iterator[InProcessRouter]:
    """Its worker takes sequences and says nothing for a long time."""
    config = RouterConfig(model=str(model_path), grpc_port=0, http_port=0, internal_port=0, max_live_requests=8192)
    running = InProcessRouter(config, token_period_s=60.0)
    yield running
    running.close()


def message_of(ops: list[Any]) -> generate_pb2.SessionRequest:
    message = generate_pb2.SessionRequest()
    for op in ops:
        if op[0] == "start":
            message.starts.add(handle=op[1], request=REQUESTS[op[2]])
        else:
            message.cancels.add(handle=op[1])
    return message


@examples(150)
@given(steps=STEPS, end=ENDS)
@example(steps=[[("start", 0, "long"), ("start", 0, "good"), ("cancel", 0), ("cancel", 0)]], end="settle")
@example(steps=[[("start", 1, "tokenized beside the loop"), ("cancel", 1)]], end="settle")
@example(steps=[[("start", 1, "tokenized beside the loop"), ("start", 2, "same id")]], end="disconnect")
def test_every_start_ends_once(router: InProcessRouter, steps: list[Any], end: str) -> None:
    client = Client(router)
    for step in steps:
        if step == "settle":
            client.send(cancel_all())
            client.settle()
        elif step == "pause":
            time.sleep(0.003)
        else:
            client.send(message_of(step))
    if end == "settle":
        client.send(cancel_all())
        client.settle()
        assert client.ended == client.started
        client.half_close()
    elif end == "half-close":
        client.half_close()
    else:
        client.call.cancel()
    assert client.over.wait(10.0)
    assert not client.problem
    assert client.call.code().name == ("CANCELLED" if end == "disconnect" else "OK")
    assert {e.code for e in client.errors} <= {3, 4, 5, 6}  # nothing but what the client did wrong
    router.becomes_empty()
    router.answers()


def cancel_all() -> generate_pb2.SessionRequest:
    return message_of([("cancel", h) for h in (0, 1, 2, (1 << 32) - 1)])


@examples(40)
@given(steps=st.lists(st.lists(st.tuples(st.just("start"), st.integers(0, 99), st.just("good"))), max_size=4))
def test_positions_of_each_answer_are_contiguous(router: InProcessRouter, steps: list[Any]) -> None:
    client = Client(router)
    used: set[int] = set()
    for step in steps:
        fresh = {op[1]: op for op in step if op[1] not in used}
        used |= fresh.keys()
        client.send(message_of(list(fresh.values())))
    client.settle()
    assert client.positions == {handle: [0, 1, 2] for handle in used}
    client.half_close()
    assert client.over.wait(10.0)
    router.becomes_empty()


@examples(150)
@given(messages=st.lists(st.one_of(st.binary(max_size=60), soup(), st.just(b"\xff")), max_size=3))
@example(messages=[field(1, b""), b"\xff"])
def test_any_bytes_end_the_session_or_nothing(router: InProcessRouter, messages: list[bytes]) -> None:
    good = message_of([("start", 7, "long")])
    call: Any = router.public.stream_stream(SESSION)(iter([good.SerializeToString(), *messages]), timeout=10)
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        pass
    assert call.code().name in ("OK", "INVALID_ARGUMENT")
    if call.code().name != "OK":
        assert "cannot be parsed" in call.details()
        assert "the schema is diptych.v1" in call.details()
    router.becomes_empty()
    router.answers()


def test_a_client_that_asks_without_end_is_cut_off_and_others_are_served(
    router: InProcessRouter, client: Client
) -> None:
    """Refusals are events too: a client that leaves them unread is cut off, and told so."""
    starts = b"".join(field(1, varint(8) + varint(i)) for i in range(200_000))
    client.started.update(range(200_000))
    client.send_bytes(starts)
    slowest = 0.0
    for _ in range(20):
        began = time.monotonic()
        router.answers()
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 20.0  # not starved; how fast is a benchmark's business
    client.call.cancel()
    router.becomes_empty()


def test_more_live_requests_than_allowed_are_refused_one_by_one(quiet_router: InProcessRouter) -> None:
    client = Client(quiet_router)
    for handles in (range(2100), range(2100, 4200)):  # a message has at most 4,096
        message = generate_pb2.SessionRequest()
        for handle in handles:
            message.starts.add(handle=handle, request=REQUESTS["long"])
        client.send(message)
    with client._changed:
        assert client._changed.wait_for(lambda: len(client.errors) >= 104 or client.problem, 30.0)
    assert not client.problem
    assert {e.code for e in client.errors} == {8}
    assert quiet_router.router.dispatcher.live_requests == 4096
    client.half_close()
    assert client.over.wait(10.0)
    quiet_router.becomes_empty()
