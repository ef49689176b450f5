"""`tools` and `tool_choice`: what the prompt offers, what the answer must be, and how calls are read out of it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import to_json

from grammar.structured import Kind, Structured, StructuredError, check_end, parse_schema
from router.admission import RawSampling
from router.dispatcher import Dispatcher
from router.doors.http.errors import ApiError, invalid
from router.errors import RequestRefused
from router.text.chat import ChatError, parse_tools
from router.text.tools.demand import DemandError, calls_or, demand_calls
from router.text.tools.events import CallStart, ToolEvent
from router.text.tools.families import FAMILIES
from router.text.tools.parser import ToolParser


class Reader:
    """Of one answer. `parallel` False: what a model writes after its first call is not given."""

    def __init__(self, parser: ToolParser, parallel: bool) -> None:
        self._parser = parser
        self._parallel = parallel
        self._over = False
        self.calls = 0

    def push(self, text: str) -> list[ToolEvent]:
        return self._seen(self._parser.push(text))

    def finish(self) -> list[ToolEvent]:
        return self._seen(self._parser.finish())

    def _seen(self, events: list[ToolEvent]) -> list[ToolEvent]:
        given: list[ToolEvent] = []
        for event in events:
            if isinstance(event, CallStart):
                self._over = self._over or (self.calls == 1 and not self._parallel)
                self.calls += not self._over
            if not self._over:
                given.append(event)
        return given


@dataclass(frozen=True, slots=True)
class Part:
    """Of a grammar: what a client wrote of it, and what it is called there."""

    param: str
    what: str
    structured: Structured
    code: str = "invalid_function_parameters"


@dataclass(frozen=True, slots=True)
class Tools:
    """`reader` None: calls are not read. `demand`: the answer is calls and nothing else. `offered`: they may come."""

    json: str = ""
    reader: Callable[[], Reader] | None = None
    demand: Structured | None = None
    parts: Sequence[Part] = ()  # of the demand
    offered: bool = False
    calls_or: Callable[[Mapping[str, Any]], Structured] | None = None  # None: how calls are written is not known


def tools_of(
    tools: list[dict[str, Any]] | None,
    choice: str | dict[str, Any] | None,
    parallel: bool | None,
    dispatcher: Dispatcher,
) -> Tools:
    """`tools` in the form of chat completions. Raises ApiError."""
    demanded, name = _demanded(choice)
    if not tools:
        if demanded:
            raise invalid("tool_choice", "tool_choice asks for a call and there are no tools; send tools")
        return Tools()
    text = to_json(tools).decode()
    try:
        parse_tools(text)
    except ChatError as error:
        raise invalid("tools", str(error).replace("tools_json", "tools")) from None
    family, several = dispatcher.tool_family, parallel is not False
    demand, parts = None, ()
    if demanded:
        try:
            demand = demand_calls(
                family, tools, name=name, parallel=several and not name, special_ids=dispatcher.tool_markers
            )
        except DemandError as error:
            raise invalid("tool_choice", str(error)) from None
        parts = _schemas(tools, name)
    if choice == "none" or not family:
        return Tools(text, offered=choice != "none")
    known = frozenset(tool["function"]["name"] for tool in tools)
    return Tools(
        text,
        lambda: Reader(FAMILIES[family].parser(known), several),
        demand,
        parts,
        True,
        lambda schema: calls_or(family, tools, schema, parallel=several, special_ids=dispatcher.tool_markers),
    )


def _schemas(tools: list[dict[str, Any]], name: str) -> tuple[Part, ...]:
    """Of the tools that are to be called."""
    return tuple(
        Part(
            f"tools[{i}].function.parameters",
            f"the parameters of tool {function['name']!r}",
            Structured(Kind.JSON_SCHEMA, to_json(function.get("parameters") or {}).decode()),
        )
        for i, function in enumerate(tool["function"] for tool in tools)
        if name in ("", function["name"])
    )


def _demanded(choice: str | dict[str, Any] | None) -> tuple[bool, str]:
    """Whether a call is, and of which function ("" = any). Raises ApiError."""
    match choice:
        case None | "auto" | "none":
            return False, ""
        case "required":
            return True, ""
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return True, name
        case {"type": "allowed_tools"}:
            raise invalid(
                "tool_choice", "tool_choice allowed_tools is not supported; send only the tools that are allowed"
            )
    raise invalid("tool_choice", 'tool_choice is "auto", "none", "required", or a function by name')


@dataclass(frozen=True, slots=True)
class Asked:
    """What an answer must look like, of tools and format together, and what its errors call it."""

    sampling: RawSampling
    params: dict[str, str]
    parts: Sequence[Part] = ()

    async def explained(self, error: ApiError, dispatcher: Dispatcher) -> ApiError:
        """A grammar that was put together here is refused for one of its parts, which is named as clients know it."""
        if not self.parts or error.param != self.params["structured"] or error.status != 400:
            return error
        for part in self.parts:
            try:
                why = await dispatcher.format_verdict(part.structured)
            except RequestRefused:
                return error
            if why:
                return invalid(
                    part.param, f"{part.what} cannot be enforced: {why}; correct it, or leave it out", part.code
                )
        return error


def asked_for(sampling: RawSampling, tools: Tools, params: dict[str, str]) -> Asked:
    """Calls and a format for what is said are no contradiction; a format for the whole answer is one. Raises ApiError.

    tool_choice         required, by name       auto                        none
    response_format     calls                   calls, or the format        the format
    structured_outputs  refused                 refused                     the format
    """
    wanted, param = sampling.structured, params["structured"]
    if wanted is not None and tools.offered and param == "structured_outputs":
        raise invalid(
            param,
            "structured_outputs is for the whole answer, which leaves no room for the calls that tools offer; send "
            'response_format (for what is said), or tool_choice "none"',
        )
    if tools.demand is not None:
        for part in tools.parts:
            _can_end(part)
        words = {
            "structured": "tools",
            "structured_words": "schemas of `tools`",
            "structured_code": "invalid_function_parameters",
        }
        return Asked(replace(sampling, structured=tools.demand), {**params, **words}, tools.parts)
    if wanted is None or not tools.offered:
        return Asked(sampling, params)
    if tools.calls_or is None:
        raise invalid(
            param,
            f"{param} with tools: how this model writes calls is not known, so none could be made; set "
            'router.tool_parser, or send tool_choice "none"',
        )
    try:
        schema = {"type": "object"} if wanted.kind is Kind.JSON_OBJECT else parse_schema(wanted.text)
    except StructuredError as error:
        raise invalid(param, f"the format of `{param}` cannot be used: {error}", "invalid_json_schema") from None
    words = {"structured_words": f"format of `{param}` and the calls of `tools`"}
    part = Part(param, f"the format of `{param}`", wanted, "invalid_json_schema")
    _can_end(part)
    return Asked(replace(sampling, structured=tools.calls_or(schema)), {**params, **words}, (part,))


def _can_end(part: Part) -> None:
    """Within a larger grammar nobody would see it before the answer. Raises ApiError."""
    try:
        check_end(part.structured)
    except StructuredError as error:
        raise invalid(part.param, f"{part.what} cannot be enforced: {error}", part.code) from None


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
