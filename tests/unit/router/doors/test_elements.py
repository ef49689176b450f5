"""Counting elements before anything is made of them: nothing usable is refused, and no number of them gets through."""

from __future__ import annotations

import json

import pytest
from diptych.v1 import generate_pb2
from hypothesis import given
from hypothesis import strategies as st

from router.doors import elements
from router.doors.elements import MAX_ELEMENTS, MAX_FIELDS, MAX_STRINGS, json_excess, proto_excess

SESSION = generate_pb2.SessionRequest.DESCRIPTOR
REQUEST = generate_pb2.GenerateRequest.DESCRIPTOR


def test_what_is_written_in_a_text_does_not_count() -> None:
    """A prompt of code, of JSON, of commas."""
    for text in ('{"a": [1, 2, 3]},' * 400_000, ',[{"\\' * 1_000_000, "\\" * 3_000_000, '"' * 3_000_001):
        assert json_excess(json.dumps({"prompt": text}).encode()) == ""


def test_too_many_of_each_kind_is_named() -> None:
    keys = json.dumps({str(n): 1 for n in range(MAX_STRINGS + 1)}).encode()
    assert json_excess(keys) == f"{MAX_STRINGS + 1} strings and keys, the limit is {MAX_STRINGS}"
    assert "elements" in json_excess(b"[" + b"1," * (MAX_ELEMENTS + 1) + b"1]")
    assert "brackets" in json_excess(b"[" + b"[]\n" * (elements.MAX_BRACKETS + 1) + b"]")
    assert json_excess(b"[" + b"1," * MAX_ELEMENTS + b"1]") == ""


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(['"', "\\", '\\"', "\\\\", ","]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def strings_in(value: object) -> int:
    if isinstance(value, dict):
        return len(value) + sum(strings_in(v) for v in value.values())
    return sum(strings_in(v) for v in value) if isinstance(value, list) else int(isinstance(value, str))


@given(values)
def test_strings_are_counted_exactly(value: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elements, "_SMALL_BYTES", 0)
        patch.setattr(elements, "MAX_STRINGS", -1)
        for ascii_only in (True, False):
            data = json.dumps(value, ensure_ascii=ascii_only).encode(errors="replace")
            assert json_excess(data).split()[0] == str(strings_in(value))


def test_messages_that_clients_send_pass() -> None:
    request = generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=range(1_000_000)), sampling=generate_pb2.SamplingParams(stop=["x"] * 16)
    )
    assert proto_excess(request.SerializeToString(), REQUEST) == ""
    text = generate_pb2.GenerateRequest(text="\0\x12\0" * 2_000_000)
    assert proto_excess(text.SerializeToString(), REQUEST) == ""
    starts = [generate_pb2.StartRequest(handle=n, request=generate_pb2.GenerateRequest(text="x")) for n in range(4096)]
    assert proto_excess(generate_pb2.SessionRequest(starts=starts).SerializeToString(), SESSION) == ""


def test_elements_are_counted_however_deep() -> None:
    many = [generate_pb2.ChatMessage(role="user")] * (MAX_FIELDS // 2)
    chat = generate_pb2.ChatMessages(messages=many)
    request = generate_pb2.GenerateRequest(chat=chat)
    assert "fields" in proto_excess(request.SerializeToString(), REQUEST)
    session = generate_pb2.SessionRequest(starts=[generate_pb2.StartRequest(request=request)])
    assert "fields" in proto_excess(session.SerializeToString(), SESSION)


@given(st.binary(max_size=400))
def test_what_is_malformed_is_left_to_the_parser(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elements, "_SMALL_BYTES", 0)
        assert proto_excess(data, REQUEST) == ""


@pytest.mark.parametrize("data", [b"\xff" * 9_000_000, b"\x12\xff\xff\xff\xff\x0f" + b"x" * 100_000, b"\x0b" * 100_000])
def test_numbers_without_end_cost_nothing(data: bytes) -> None:
    proto_excess(data, SESSION)


def test_more_numbers_than_any_prompt_has() -> None:
    ids = generate_pb2.TokenIds(ids=[1] * (4 * MAX_ELEMENTS + 1))
    assert "numbers" in proto_excess(generate_pb2.GenerateRequest(token_ids=ids).SerializeToString(), REQUEST)
    largest = generate_pb2.TokenIds(ids=[(1 << 28) - 1] * (MAX_ELEMENTS - 1))
    assert proto_excess(generate_pb2.GenerateRequest(token_ids=largest).SerializeToString(), REQUEST) == ""
