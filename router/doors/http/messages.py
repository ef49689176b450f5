"""Messages of a conversation as clients send them.

A history is what a client makes of answers, ours and others': its SDK adds fields (`annotations`, `parsed`, `index`),
writes null for what is not there, and cuts a call where max_tokens cut it. So here the world is open: null is nothing,
a field that says nothing to a model is dropped, arguments that are no JSON are text. What would change the answer and
cannot be carried out is refused by name (`_REFUSED`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic_core import to_json

from router.doors.http.errors import invalid
from router.doors.http.parse import Body
from router.text.chat import MAX_CHAT_MESSAGES, ChatMessage, ToolCall

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_NEEDS_CONTENT = ("system", "user")
_UNSAID = frozenset(("reasoning", "thinking", "redacted_thinking"))  # parts of an assistant's content, not for a prompt
_REFUSED = {
    "function_call": "the deprecated form; send tool_calls",
    "audio": "text only",
    "images": "text only",
    "prefix": "to go on with the last message, send `continue_final_message: true`",
    "partial": "to go on with the last message, send `continue_final_message: true`",
}


class _Open(Body):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _Function(_Open):
    name: str
    arguments: str | dict[str, Any] | None = None


class _ToolCall(_Open):
    id: str | None = None
    type: str | None = None
    function: _Function | None = None


class Message(_Open):
    role: str
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[_ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None
    images: Any = None
    prefix: Any = None
    partial: Any = None


def messages_of(messages: list[Message]) -> list[ChatMessage]:
    """Of the field `messages`. Raises ApiError."""
    if not messages:
        raise invalid("messages", "there are no messages; send at least one")
    if len(messages) > MAX_CHAT_MESSAGES:
        raise invalid("messages", f"{len(messages)} messages, the limit is {MAX_CHAT_MESSAGES}; send fewer")
    return [_message(m, f"messages[{i}]") for i, m in enumerate(messages)]


def _message(message: Message, param: str) -> ChatMessage:
    role = ROLES.get(message.role)
    if role is None:
        shown = message.role[:100]
        raise invalid(f"{param}.role", f"role {shown!r} does not exist; use {', '.join(ROLES)}")
    if not _REFUSED.keys().isdisjoint(message.model_fields_set):
        for name, why in _REFUSED.items():
            if getattr(message, name):
                raise invalid(f"{param}.{name}", f"{param}.{name} is not supported: {why}")
    if message.tool_calls and role != "assistant":
        raise invalid(f"{param}.tool_calls", "tool_calls are an assistant's; leave them out")
    if (message.tool_call_id is not None) != (role == "tool"):
        raise invalid(f"{param}.tool_call_id", "tool_call_id is for messages of role tool, which need it")
    if message.content is None and role in _NEEDS_CONTENT:
        raise invalid(f"{param}.content", f"{param}.content is missing; send text")
    return ChatMessage(
        role,
        text_of(message.content or "", f"{param}.content", role) or message.refusal or "",
        message.name or "",
        tuple(_call(c, f"{param}.tool_calls[{i}]") for i, c in enumerate(message.tool_calls or ())),
        message.tool_call_id or "",
    )


def _call(call: _ToolCall, param: str) -> ToolCall:
    if call.function is None:
        kind = (call.type or "function")[:100]
        raise invalid(f"{param}.function", f"a call of type {kind!r} is not supported; send calls of functions")
    return ToolCall(call.id or "", call.function.name, arguments_text(call.function.arguments))


def arguments_text(arguments: str | dict[str, Any] | None) -> str:
    """Some clients send the object itself, where the API has its text."""
    if arguments is None or isinstance(arguments, str):
        return arguments or "{}"
    return to_json(arguments).decode()


def text_of(content: str | list[dict[str, Any]], param: str, role: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """Of a string, or of parts that are text, joined. Raises ApiError."""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type")
        if role == "assistant" and kind in _UNSAID:
            continue
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in kinds and kind != "refusal":
            raise invalid(f"{param}[{i}].type", f"a part of type {str(kind)[:100]!r} is not supported; send text")
        if not isinstance(text, str):
            raise invalid(f"{param}[{i}].text", f"{param}[{i}].text is missing; send a string")
        texts.append(text)
    return "".join(texts)
