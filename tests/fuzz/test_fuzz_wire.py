"""What comes from sockets between our own processes: a value or ValueError. What we send comes back as it was."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from diptych.v1 import generate_pb2, handoff_pb2, worker_pb2
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from kv_transfer.handoff import (
    Acceptance,
    BlocksAnnounced,
    FinalAnnounced,
    Follow,
    PeerHello,
    PeerId,
    RefusalReason,
    Refused,
    Release,
    Renew,
    TokenLogprobs,
)
from kv_transfer.nixl_endpoint import NixlEndpoint
from kv_transfer.transport import KvArea
from kv_transfer.wire import (
    hello_from_wire,
    hello_to_wire,
    reader_messages_from_wire,
    reader_messages_to_wire,
    source_messages_from_wire,
    source_messages_to_wire,
)
from router.doors.grpc.wire import request_from_wire
from router.errors import RequestRefused
from router.wire import block_events_from_wire, info_from_wire, pack_tokens
from tests.support.fuzz import examples
from tests.support.wire_bytes import mutated, soup
from worker.wire import commands_from_wire, unpack_tokens

U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
NAMES = st.text(max_size=12)


def parsed(message: Any, data: bytes) -> Any:
    with contextlib.suppress(DecodeError):
        return message.FromString(data)
    return None


# Endpoints.

ENDPOINTS = st.builds(
    NixlEndpoint,
    host=st.binary(min_size=16, max_size=16),
    areas=st.lists(
        st.builds(KvArea, st.integers(1, 1 << 40), st.integers(1, 1 << 20), st.integers(1, 1 << 20)),
        min_size=1,
        max_size=4,
    ).map(tuple),
    generations_address=st.integers(1, 1 << 40),
    scratch_address=st.integers(1, 1 << 40),
    scratch_slots=st.integers(1, 1 << 20),
    device=st.integers(-1, 7),
    metadata=st.binary(max_size=50),
)


@examples(300)
@given(endpoint=ENDPOINTS)
def test_an_endpoint_comes_back(endpoint: NixlEndpoint) -> None:
    assert NixlEndpoint.unpack(endpoint.pack()) == endpoint


@examples(500)
@given(data=st.one_of(st.binary(max_size=120), mutated(ENDPOINTS.map(NixlEndpoint.pack))))
@example(data=b"dptnixl2" + b"\xff" * 68)
@example(data=b"dptnixl2" + b"\0" * (2 << 20))
def test_any_bytes_are_an_endpoint_within_bounds_or_refused(data: bytes) -> None:
    try:
        endpoint = NixlEndpoint.unpack(data)
    except ValueError as error:
        reason = str(error)
    else:
        assert endpoint.pack() == data
        num_blocks = sum(area.num_blocks for area in endpoint.areas)
        for address, count, size in (
            *((area.base_address, area.num_blocks, area.block_bytes) for area in endpoint.areas),
            (endpoint.generations_address, num_blocks, 8),
            (endpoint.scratch_address, endpoint.scratch_slots, 8),
        ):
            assert 0 < address < address + count * size < 1 << 64
        # A list of descriptors is made of these: 24 bytes each.
        assert num_blocks <= 1 << 24
        assert 1 <= len(endpoint.areas) <= 64
        assert endpoint.scratch_slots <= 1 << 24
        assert endpoint.device >= -1
        return
    assert "endpoint" in reason


# Handoffs.

HELLOS = st.builds(PeerHello, st.builds(PeerId, NAMES, U64), NAMES, NAMES, st.binary(max_size=40))
FLOATS = st.floats(width=32, allow_nan=False)
LOGPROBS = st.builds(TokenLogprobs, FLOATS, st.lists(st.tuples(U32, FLOATS), max_size=3).map(tuple))


@st.composite
def announcements(draw: st.DrawFn) -> BlocksAnnounced:
    count = draw(st.integers(0, 5))
    columns = st.lists(U64, min_size=count, max_size=count).map(tuple)
    digests = draw(columns) if draw(st.booleans()) else ()
    blocks = draw(st.lists(U32, min_size=count, max_size=count).map(tuple))
    return BlocksAnnounced(draw(NAMES), draw(U32), blocks, draw(columns), digests)


COUNTS = st.floats(0.0, 500.0, width=32)
ACCEPTANCE = st.builds(
    lambda method, one, two, at: Acceptance(method, min(one, two), max(one, two), at),
    st.text(max_size=32), COUNTS, COUNTS, U32,
)  # fmt: skip


@st.composite
def finals(draw: st.DrawFn) -> FinalAnnounced:
    emitted = draw(st.lists(U32, max_size=3).map(tuple))
    logprobs = draw(st.lists(LOGPROBS, max_size=len(emitted)).map(tuple))
    return FinalAnnounced(draw(NAMES), draw(U32), emitted, logprobs, draw(st.none() | ACCEPTANCE))


REFUSALS = st.builds(Refused, NAMES, st.sampled_from(RefusalReason), NAMES)


@examples(200)
@given(hello=HELLOS)
def test_a_hello_comes_back(hello: PeerHello) -> None:
    assert hello_from_wire(hello_to_wire(hello)) == hello


@examples(200)
@given(
    st.lists(st.builds(Follow, NAMES)),
    st.lists(st.builds(Renew, NAMES)),
    st.lists(st.builds(Release, NAMES, st.booleans())),
)
def test_what_a_reader_says_comes_back(follows: list[Any], renews: list[Any], releases: list[Any]) -> None:
    messages = (*follows, *renews, *releases)
    assert reader_messages_from_wire(reader_messages_to_wire(messages)) == messages


@examples(200)
@given(st.lists(announcements(), max_size=3), st.lists(finals(), max_size=3), st.lists(REFUSALS, max_size=3))
def test_what_a_source_says_comes_back(blocks: list[Any], ends: list[Any], refusals: list[Any]) -> None:
    messages = (*blocks, *ends, *refusals)
    assert source_messages_from_wire(source_messages_to_wire(messages)) == messages


@pytest.mark.parametrize(
    "said",
    [
        {"accepted": 2.0, "tried": 1.0},
        {"accepted": -1.0, "tried": 1.0},
        {"accepted": float("nan"), "tried": 1.0},
        {"accepted": 1.0, "tried": float("inf")},
        {"accepted": 1.0, "tried": 1e30},
        {"method": "x" * 33},
    ],
)
def test_an_acceptance_that_cannot_be_is_passed_over(said: dict[str, Any]) -> None:
    final = handoff_pb2.AnnounceFinal(handoff_id="h", acceptance=handoff_pb2.DraftAcceptance(**said))
    assert source_messages_from_wire(handoff_pb2.AttachResponse(finals=[final])) == (FinalAnnounced("h", 0, ()),)


LOPSIDED = handoff_pb2.AnnounceFinal(emitted=[1, 2], logprobs=[generate_pb2.TokenLogprobs(logprob=-1.0)])
SOURCE_BYTES = st.lists(st.one_of(announcements(), finals(), REFUSALS), max_size=4).map(
    lambda m: source_messages_to_wire(m).SerializeToString()
)


@examples(500)
@given(data=st.one_of(st.binary(max_size=100), soup(), mutated(SOURCE_BYTES)))
@example(data=handoff_pb2.AttachResponse(finals=[LOPSIDED]).SerializeToString())
def test_any_bytes_of_a_peer_are_messages_or_refused(data: bytes) -> None:
    request = parsed(handoff_pb2.AttachRequest, data)
    if request is not None:
        hello_from_wire(request.hello)
        reader_messages_from_wire(request)
    response = parsed(handoff_pb2.AttachResponse, data)
    if response is None:
        return
    with contextlib.suppress(ValueError):
        for message in source_messages_from_wire(response):
            if isinstance(message, BlocksAnnounced):
                assert len(message.generations) == len(message.block_ids)
                assert len(message.digests) in (0, len(message.block_ids))
            if isinstance(message, FinalAnnounced):
                assert len(message.logprobs) <= len(message.emitted)


# Router and worker.


@examples(200)
@given(tokens=st.lists(U32, max_size=20))
def test_tokens_come_back(tokens: list[int]) -> None:
    assert unpack_tokens(pack_tokens(tokens)) == tokens


START_BYTES = st.builds(
    lambda *f: worker_pb2.ConnectRequest(
        starts=[worker_pb2.StartSequence(sequence_id=f[0], prompt=f[1], emitted=f[2], deadline_ms=f[3])]
    ).SerializeToString(),
    U64,
    st.binary(max_size=12),
    st.binary(max_size=12),
    U32,
)


@examples(500)
@given(data=st.one_of(st.binary(max_size=100), soup(), START_BYTES, mutated(START_BYTES)))
@example(data=worker_pb2.ConnectRequest(starts=[worker_pb2.StartSequence(prompt=b"abc")]).SerializeToString())
def test_any_bytes_between_router_and_worker_are_values_or_refused(data: bytes) -> None:
    commands = parsed(worker_pb2.ConnectRequest, data)
    if commands is not None:
        with contextlib.suppress(ValueError):
            commands_from_wire(commands)
    request = parsed(generate_pb2.GenerateRequest, data)
    if request is not None:
        with contextlib.suppress(RequestRefused):
            request_from_wire(request)
    registration = parsed(worker_pb2.RegisterRequest, data)
    if registration is not None:
        with contextlib.suppress(RequestRefused):
            info_from_wire(registration)
    events = parsed(worker_pb2.BlockEvents, data)
    if events is not None:
        block_events_from_wire(events)
