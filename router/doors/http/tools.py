"""`tools` and `tool_choice`: what the prompt offers, what the answer must be, and how calls are read out of it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import to_json

from grammar.structured import Structured
from router.admission import RawSampling
from router.dispatcher import Dispatcher
from router.doors.http.errors import invalid
from router.text.chat import ChatError, parse_tools
from router.text.tools.demand import DemandError, demand_calls
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
class Tools:
    """`reader` None: calls are not looked for. `demand`: the answer is calls, and nothing else."""

    json: str = ""
    reader: Callable[[], Reader] | None = None
    demand: Structured | None = None


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
    demand = None
    if demanded:
        try:
            demand = demand_calls(
                family, tools, name=name, parallel=several and not name, special_ids=dispatcher.tool_markers
            )
        except DemandError as error:
            raise invalid("tool_choice", str(error)) from None
    if choice == "none" or not family:
        return Tools(text)
    known = frozenset(tool["function"]["name"] for tool in tools)
    return Tools(text, lambda: Reader(FAMILIES[family].parser(known), several), demand)


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


def with_demand(sampling: RawSampling, tools: Tools, params: dict[str, str]) -> tuple[RawSampling, dict[str, str]]:
    """And what to call the demand in an error. Raises ApiError."""
    if tools.demand is None:
        return sampling, params
    if sampling.structured is not None:
        raise invalid(
            "tool_choice", f"tool_choice asks for a call and {params['structured']} for something else; send one"
        )
    return replace(sampling, structured=tools.demand), {**params, "structured": "tools"}


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
