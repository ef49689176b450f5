"""Tool conversations for templates that know tools and for those that do not; nothing that was sent is dropped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.text.chat import (
    Arguments,
    Chat,
    ChatError,
    ChatMessage,
    ToolCall,
    check_chat,
    native_messages,
    plain_messages,
)

TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]
ASKED = (
    ChatMessage("system", "Be brief."),
    ChatMessage("user", "Weather in Köln?"),
    ChatMessage("assistant", "Let me see.", tool_calls=(ToolCall("c1", "weather", '{"city": "Köln"}'),)),
    ChatMessage("tool", '{"celsius": 9}', name="weather", tool_call_id="c1"),
    ChatMessage("tool", '{"celsius": 8}', tool_call_id="c2"),
)


def test_a_template_that_knows_tools_gets_them_as_they_are() -> None:
    messages = native_messages(ASKED)
    assert messages[2]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    ]
    assert messages[3] == {"role": "tool", "content": '{"celsius": 9}', "name": "weather", "tool_call_id": "c1"}
    as_text = native_messages(ASKED, Arguments.TEXTS)
    assert as_text[2]["tool_calls"][0]["function"]["arguments"] == '{"city": "Köln"}'


def test_for_one_that_does_not_they_become_text() -> None:
    system, user, assistant, results = plain_messages(ASKED, TOOLS)
    assert system["content"].startswith("Be brief.\n\n")
    assert json.dumps(TOOLS[0]) in system["content"]
    assert user == {"role": "user", "content": "Weather in Köln?"}
    assert assistant["content"] == (
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    )
    assert results == {
        "role": "user",
        "content": '<tool_response name="weather">\n{"celsius": 9}\n</tool_response>\n'
        '<tool_response>\n{"celsius": 8}\n</tool_response>',
    }


def test_without_a_system_message_tools_bring_one() -> None:
    messages = plain_messages([ChatMessage("user", "Hi")], TOOLS)
    assert [m["role"] for m in messages] == ["system", "user"]
    assert plain_messages([ChatMessage("user", "Hi", name="Ann")], []) == [{"role": "user", "content": "Ann: Hi"}]


@pytest.mark.parametrize(
    ("tools_json", "words"),
    [
        ("{", "not JSON"),
        ("{}", "not an array"),
        ("[1]", "not of the form"),
        ('[{"type": "web_search"}]', "not of the form"),
        ('[{"type": "function", "function": {}}]', "name must match"),
        ('[{"type": "function", "function": {"name": "a b"}}]', "name must match"),
        (json.dumps([{"function": {"name": "f"}}] * 2), "two tools are called f"),
        ('[{"function": {"name": "f", "parameters": [1]}}]', "parameters of tool f"),
        (json.dumps([{"function": {"name": "f"}}] * 129), "129 tools"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_tools_are_refused(tools_json: str, words: str) -> None:
    with pytest.raises(ChatError, match=words):
        Chat([ChatMessage("user", "Hi")], tools_json).tools()


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (ChatMessage("user", name="n" * 300), "name"),
        (ChatMessage("tool", tool_call_id="n" * 300), "tool_call_id"),
        (ChatMessage("assistant", tool_calls=(ToolCall("", ""),)), "tool_calls"),
        (ChatMessage("assistant", tool_calls=(ToolCall("", "f"),) * 129), "tool_calls"),
    ],
)
def test_bad_messages_are_refused(message: ChatMessage, field: str) -> None:
    with pytest.raises(ChatError) as refused:
        check_chat(Chat([message]))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("arguments", "as_object", "as_text", "object_only"),
    [
        ('{"a": 1}', {"a": 1}, '{"a": 1}', {"a": 1}),
        ("", {}, "{}", {}),
        (" ", {}, "{}", {}),
        ("null", {}, "{}", {}),
        ('{"city": "Be', '{"city": "Be', '{"city": "Be', {"arguments": '{"city": "Be'}),
        ("[1]", "[1]", "[1]", {"arguments": "[1]"}),
        ("1" * 5000, "1" * 5000, "1" * 5000, {"arguments": "1" * 5000}),
        ("[" * 100_000, "[" * 100_000, "[" * 100_000, {"arguments": "[" * 100_000}),
    ],
)
def test_arguments_that_are_no_object_are_text(arguments: str, as_object: Any, as_text: Any, object_only: Any) -> None:
    said = [ChatMessage("assistant", tool_calls=(ToolCall("", "f", arguments),))]
    for wanted, expected in zip(Arguments, (as_object, as_text, object_only), strict=True):
        (message,) = native_messages(said, wanted)
        assert message["tool_calls"][0]["function"]["arguments"] == expected
    assert json.dumps(as_object) in plain_messages(said, [])[0]["content"]


def test_sizes_count_everything() -> None:
    chat = Chat([ChatMessage("user", "é", "n", (ToolCall("i", "f", "{}"),), "t")], "[]", "{}")
    assert (chat.size_chars, chat.size_bytes) == (15, 16)
