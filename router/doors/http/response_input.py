"""The items of a response's input, as messages: what a client sends anew, and what it sends back of our output.

As in messages.py the world is open: null is nothing, and a field that says nothing to a model is dropped. Reasoning is
not for a prompt. Items of OpenAI's own tools are refused by name: without them a conversation would have holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from router.doors.http.errors import invalid
from router.doors.http.messages import ROLES, arguments_text, text_of
from router.text.chat import MAX_CHAT_MESSAGES, ChatMessage, ToolCall

_TEXT_PARTS = ("input_text", "output_text", "text")
# Tools that OpenAI's servers or their harness run: there are none here, so models are not told of them.
OTHER_TOOLS = frozenset(
    (
        *(
            "file_search",
            "computer",
            "computer_use_preview",
            "web_search",
            "web_search_2025_08_26",
            "mcp",
            "local_shell",
        ),
        *("code_interpreter", "programmatic_tool_calling", "image_generation", "shell", "custom", "namespace"),
        *("tool_search", "web_search_preview", "web_search_preview_2025_03_11", "apply_patch"),
    )
)


def conversation_of(given: str | list[dict[str, Any]] | None, instructions: str | None) -> list[ChatMessage]:
    """Of `input` and `instructions`. Raises ApiError."""
    if not given:
        raise invalid("input", "there is no input; send a string, or at least one message")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if len(items) > MAX_CHAT_MESSAGES:
        raise invalid("input", f"{len(items)} items, the limit is {MAX_CHAT_MESSAGES}; send fewer")
    messages = [ChatMessage("system", instructions)] if instructions else []
    for i, item in enumerate(items):
        message = _message(item, f"input[{i}]")
        if message is None:
            continue
        last = messages[-1] if messages else None
        if message.tool_calls and last is not None and last.role == "assistant":
            # One answer's items: as chat completions have them, one message.
            messages[-1] = replace(last, tool_calls=last.tool_calls + message.tool_calls)
        else:
            messages.append(message)
    if not messages:
        raise invalid("input", "there is no input beside reasoning; send at least one message")
    return messages


def _message(item: dict[str, Any], param: str) -> ChatMessage | None:
    """None: nothing for a prompt."""
    kind = item.get("type") or "message"
    match kind:
        case "message":
            role = ROLES.get(_text(item, "role", param))
            if role is None or role == "tool":
                raise invalid(
                    f"{param}.role", f"role {item['role'][:100]!r} does not exist; use system, user, assistant"
                )
            return ChatMessage(role, _said(item, "content", param, role))
        case "function_call":
            arguments = item.get("arguments")
            if "arguments" not in item or not isinstance(arguments, str | dict | None):
                arguments = _text(item, "arguments", param)
            call = ToolCall(_text(item, "call_id", param), _text(item, "name", param), arguments_text(arguments))
            return ChatMessage("assistant", tool_calls=(call,))
        case "function_call_output":
            return ChatMessage("tool", _said(item, "output", param, "tool"), tool_call_id=_text(item, "call_id", param))
        case "reasoning":
            return None
    raise invalid(
        f"{param}.type",
        f"an item of type {str(kind)[:100]!r} is not supported; send message, function_call or function_call_output",
    )


def _said(item: dict[str, Any], name: str, param: str, role: str) -> str:
    value = item.get(name)
    if value is None and role in ("assistant", "tool") and name in item:
        return ""
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(p, dict) for p in value)):
        raise invalid(f"{param}.{name}", f"{param}.{name} is missing; send text, or a list of parts")
    return text_of(value, f"{param}.{name}", role, _TEXT_PARTS)


def _text(item: dict[str, Any], name: str, param: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise invalid(f"{param}.{name}", f"{param}.{name} is missing; send a string")
    return value


def functions_of(tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The functions among them, in the form of chat completions. Raises ApiError."""
    wanted = []
    for i, tool in enumerate(tools or ()):
        kind = tool.get("type")
        if kind == "function":
            wanted.append({"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}})
        elif kind not in OTHER_TOOLS:
            raise invalid(f"tools[{i}].type", f"a tool of type {str(kind)[:100]!r} does not exist; send functions")
    return wanted
