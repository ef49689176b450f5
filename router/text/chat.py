"""A conversation, tools included, as a client sends it; its check, and its form for a chat template.

A template that knows tools gets them as Hugging Face's convention has it (`tools=`, `tool_calls` in messages). For one
that does not, tools are written into the system message in the Hermes format, calls and results into tags: a model that
was never taught tools then at least sees them, and nothing that the client sent is dropped.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CHAT_MESSAGES = 4096
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
MAX_ROLE_BYTES = 64
MAX_NAME_BYTES = 256
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments_json` is the text of a JSON object; what max_tokens cut, or a model got wrong, stays text."""

    id: str
    name: str
    arguments_json: str = "{}"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str = ""
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        calls = tuple(text for c in self.tool_calls for text in (c.id, c.name, c.arguments_json))
        return (self.role, self.content, self.name, self.tool_call_id, *calls)


@dataclass(frozen=True, slots=True)
class Chat:
    """`tools_json`: an array as OpenAI's `tools`. `template_kwargs_json`: an object. Both empty when there are none."""

    messages: Sequence[ChatMessage]
    tools_json: str = ""
    template_kwargs_json: str = ""
    generation_prompt: bool | None = None  # whether the assistant's next message is opened; None: as is usual
    continue_final: bool = False  # the last message stays open instead

    @property
    def size_chars(self) -> int:
        return sum(len(t) for t in self._texts())

    @property
    def size_bytes(self) -> int:
        return sum(len(t.encode(errors="replace")) for t in self._texts())

    def _texts(self) -> list[str]:
        return [self.tools_json, self.template_kwargs_json, *(text for m in self.messages for text in m.texts)]

    def tools(self) -> list[dict[str, Any]]:
        """Raises ChatError."""
        return parse_tools(self.tools_json) if self.tools_json else []

    def template_kwargs(self) -> dict[str, Any]:
        """Raises ChatError."""
        return _json_object(self.template_kwargs_json, "chat_template_kwargs_json") if self.template_kwargs_json else {}


class ChatError(ValueError):
    """`field` names the part of the request; the message names cause and fix."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def check_chat(chat: Chat) -> None:
    """Counts, roles, names. JSON is looked at when it is used (`tools`, `template_kwargs`). Raises ChatError."""
    if not chat.messages:
        raise ChatError("chat", "the chat has no messages; send at least one")
    if len(chat.messages) > MAX_CHAT_MESSAGES:
        raise ChatError("chat", f"{len(chat.messages)} chat messages, the limit is {MAX_CHAT_MESSAGES}; send fewer")
    if chat.continue_final and chat.generation_prompt:
        why = "continue_final_message and add_generation_prompt are both true; an answer goes on, or begins: choose one"
        raise ChatError("continue_final_message", why)
    for m in chat.messages:
        if not m.role:
            raise ChatError("chat", "a chat message has no role; use system, user, assistant or tool")
        if len(m.role.encode(errors="replace")) > MAX_ROLE_BYTES:
            raise ChatError("chat", f"a chat role is longer than {MAX_ROLE_BYTES} bytes; use system, user or assistant")
        for name, value in (("name", m.name), ("tool_call_id", m.tool_call_id)):
            if len(value.encode(errors="replace")) > MAX_NAME_BYTES:
                raise ChatError(name, f"a message's {name} is longer than {MAX_NAME_BYTES} bytes; use a shorter one")
        if len(m.tool_calls) > MAX_TOOL_CALLS:
            raise ChatError("tool_calls", f"{len(m.tool_calls)} calls in one message, the limit is {MAX_TOOL_CALLS}")
        if any(not c.name for c in m.tool_calls):
            raise ChatError("tool_calls", "a tool call has no name; name the function that was called")


def parse_tools(tools_json: str) -> list[dict[str, Any]]:
    """OpenAI's `tools`, checked: functions with distinct names and, if any, parameters that are an object."""
    try:
        tools = json.loads(tools_json)
    except (ValueError, RecursionError) as error:
        raise ChatError("tools_json", f"tools_json is not JSON ({error}); send an array of functions") from None
    if not isinstance(tools, list):
        raise ChatError("tools_json", "tools_json is not an array; send a JSON array of functions")
    if len(tools) > MAX_TOOLS:
        raise ChatError("tools_json", f"{len(tools)} tools, the limit is {MAX_TOOLS}; send fewer")
    names = set()
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            wanted = '{"type": "function", "function": {"name": ...}}'
            raise ChatError("tools_json", f"a tool is not of the form {wanted}; send it so")
        name = function.get("name")
        if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise ChatError("tools_json", f"a tool's name must match {_TOOL_NAME.pattern}; rename it")
        if name in names:
            raise ChatError("tools_json", f"two tools are called {name}; names must differ")
        names.add(name)
        if not isinstance(function.get("parameters") or {}, dict):
            raise ChatError("tools_json", f"the parameters of tool {name} are not a JSON Schema object; send one")
    return tools


def _json_object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ChatError(field, f"{field} is not JSON ({error}); send a JSON object") from None
    if not isinstance(value, dict):
        raise ChatError(field, f"{field} is not a JSON object; send one")
    return value


# For a template that knows tools.


class Arguments(enum.Enum):
    """How a template wants the arguments of calls; whatever it wants, no call in a history is refused for them."""

    OBJECTS = enum.auto()  # most
    TEXTS = enum.auto()  # some
    OBJECTS_ONLY = enum.auto()  # those that walk through them: what is no object becomes one


def native_messages(messages: Sequence[ChatMessage], arguments: Arguments = Arguments.OBJECTS) -> list[dict[str, Any]]:
    """Hugging Face's convention."""
    rendered = []
    for m in messages:
        message: dict[str, Any] = {"role": m.role, "content": m.content}
        if m.name:
            message["name"] = m.name
        if m.tool_call_id:
            message["tool_call_id"] = m.tool_call_id
        if m.tool_calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": _arguments(c, arguments)}}
                for c in m.tool_calls
            ]
        rendered.append(message)
    return rendered


def _arguments(call: ToolCall, wanted: Arguments = Arguments.OBJECTS) -> dict[str, Any] | str:
    """Null and nothing are no arguments; what is no object is text."""
    try:
        value = json.loads(call.arguments_json.strip() or "{}")
    except (ValueError, RecursionError):
        value = call.arguments_json
    if value is None:
        value = {}
    if wanted is Arguments.TEXTS:
        return call.arguments_json if value else "{}"
    if isinstance(value, dict):
        return value
    return call.arguments_json if wanted is Arguments.OBJECTS else {"arguments": call.arguments_json}


# For a template that walks through parts, as those of models that see.


def in_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


# For a template that does not know tools.

_TOOLS_HEAD = """You can call functions. Their signatures, as JSON, one a line:
<tools>
"""
_TOOLS_TAIL = """
</tools>
To call a function, write its name and arguments as JSON within tags, one pair of tags for each call:
<tool_call>
{"name": "<function name>", "arguments": {<arguments>}}
</tool_call>
Results come back within <tool_response> tags."""


def plain_messages(messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Role and content alone, tools and all in Hermes' tags. A speaker's name goes in front of what was said."""
    rendered: list[dict[str, str]] = []
    in_results = False
    for m in messages:
        if m.role == "tool":
            name = f" name={json.dumps(m.name)}" if m.name else ""
            result = f"<tool_response{name}>\n{m.content}\n</tool_response>"
            if in_results:  # templates want roles to take turns
                rendered[-1]["content"] += f"\n{result}"
            else:
                rendered.append({"role": "user", "content": result})
            in_results = True
            continue
        in_results = False
        content = f"{m.name}: {m.content}" if m.name else m.content
        for call in m.tool_calls:
            written = json.dumps({"name": call.name, "arguments": _arguments(call)}, ensure_ascii=False)
            content += ("\n" if content else "") + f"<tool_call>\n{written}\n</tool_call>"
        rendered.append({"role": m.role, "content": content})
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        prompt = f"{_TOOLS_HEAD}{lines}{_TOOLS_TAIL}"
        if rendered and rendered[0]["role"] == "system":
            rendered[0]["content"] += f"\n\n{prompt}"
        else:
            rendered.insert(0, {"role": "system", "content": prompt})
    return rendered
