"""Calls as a grammar: the family's envelope around the tools' own schemas.

demand_calls   tool_choice "required", or one function by name: calls, and nothing else
calls_or       tool_choice "auto" beside a format for what is said: calls, or what has the format
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from grammar.structured import JSON_WHITESPACE, Kind, Structured
from router.text.tools.families import ARGS, CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR, TOOL_CALLS

_MARKERS = (TOOL_CALLS, ARGS, CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)


class DemandError(ValueError):
    """Names the cause."""


def demand_calls(
    family: str,
    tools: Sequence[Mapping[str, Any]],
    *,
    name: str = "",
    parallel: bool = True,
    special_ids: Mapping[str, int] | None = None,
) -> Structured:
    """A grammar whose every answer is one call of a tool (with `parallel`: one or more), and nothing else.

    `name`: of this tool alone. `special_ids`: the family's markers that are special tokens of the tokenizer
    (Tokenizer.special_ids). Raises DemandError.
    """
    if not family:
        raise DemandError(
            "how this model writes tool calls is not known; set router.tool_parser, or use tool_choice auto"
        )
    functions = [tool["function"] for tool in tools if not name or tool["function"]["name"] == name]
    if not functions:
        raise DemandError(f"there is no tool {name!r} to choose; name one of `tools`" if name else "there are no tools")
    lines: list[str] = []
    called = [(f["name"], f.get("parameters") or _NONE) for f in functions]
    _write_calls("start", family, called, parallel, special_ids, lines)
    return Structured(Kind.LARK, "\n".join(lines))


def calls_or(
    family: str,
    tools: Sequence[Mapping[str, Any]],
    schema: Mapping[str, Any],
    *,
    parallel: bool = True,
    special_ids: Mapping[str, int] | None = None,
) -> Structured:
    """A grammar whose every answer is calls, or a value of `schema`.

    The tools' schemas are not enforced, as they never are with "auto": arguments are an object, whatever is in it.
    """
    if family == "llama3":
        return _object_or_call([t["function"]["name"] for t in tools], schema)
    lines: list[str] = []
    functions = [(t["function"]["name"], _loose(family, t["function"].get("parameters") or {})) for t in tools]
    _write_calls("calls", family, functions, parallel, special_ids, lines)
    said = _json_rule("said", schema, lines)
    return Structured(Kind.LARK, "\n".join([*lines, f"start: calls | {said}"]))


_NONE = {"type": "object", "properties": {}, "additionalProperties": False}


def _object_or_call(names: Sequence[str], schema: Mapping[str, Any]) -> Structured:
    """One schema, where calls are bare objects: of two grammars that begin alike the lexer would follow the longer."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": {"type": "object"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in names
    ]
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    own = {key: value for key, value in schema.items() if key not in shared}
    return Structured(Kind.JSON_SCHEMA, json.dumps({**shared, "anyOf": [*calls, own]}))


def _loose(family: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    if family != "pythonic":
        return {"type": "object"}
    properties = parameters.get("properties")
    return {"properties": {key: {} for key in properties if key.isidentifier()} if isinstance(properties, dict) else {}}


def _write_calls(
    rule: str,
    family: str,
    functions: Sequence[tuple[str, Any]],
    parallel: bool,
    special_ids: Mapping[str, int] | None,
    lines: list[str],
) -> None:
    """A rule of one call or more, of functions by name and parameters."""
    ids = special_ids or {}
    for i, (name, parameters) in enumerate(functions):
        call = _CALLS[family](name, i, parameters, lines)
        lines.append(f"call_{i}: {_written(call, ids)}")
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    begin, between, end = _AROUND[family]
    repeated = f"({_written([between], ids)} call)*" if parallel else ""
    lines.append(f"{rule}: {_written([begin], ids)} call {repeated} {_written([end], ids)}")


class _Rule(str):
    """The name of a rule, where other parts are literal text."""


Part = str | _Rule


def _json_rule(name: str, schema: Any, lines: list[str]) -> _Rule:
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
    lines.append(f"{name}: %json {json.dumps(schema)}")
    return _Rule(name)


def _object_call(key: str, before: str = "", after: str = "") -> Any:
    def call(name: str, number: int, parameters: Any, lines: list[str]) -> list[Part]:
        head = f'{before}{{"name": {json.dumps(name)}, "{key}": '
        return [head, _json_rule(f"args_{number}", parameters, lines), f"}}{after}"]

    return call


def _deepseek_call(name: str, number: int, parameters: Any, lines: list[str]) -> list[Part]:
    arguments = _json_rule(f"args_{number}", parameters, lines)
    head = f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n"
    return [head, arguments, f"\n```{CALL_END}"]


def _python_call(name: str, number: int, parameters: Any, lines: list[str]) -> list[Part]:
    """Keyword arguments in the schema's order, the required ones always. Their values are JSON, which is read too."""
    properties = parameters.get("properties") or {}
    required = parameters.get("required") or []
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    pieces = []
    for i, (key, schema) in enumerate(properties.items()):
        if not key.isidentifier():
            raise DemandError(
                f"the parameter {key[:64]!r} of {name} is no Python name; this model calls tools in Python"
            )
        if isinstance(schema, dict):
            schema = {**shared, **schema}
        rule = _json_rule(f"args_{number}_{i}", schema, lines)
        pieces.append((key in required, f"{_text(key + '=')} {rule}"))
    pieces.sort(key=lambda piece: not piece[0])  # required ones first: then each of the others brings its own comma
    rule = f"args_{number}"
    lines.append(f"{rule}: {_sequence(pieces) or _text('')}")
    return [f"{name}(", _Rule(rule), ")"]


def _sequence(pieces: list[tuple[bool, str]]) -> str:
    """The required ones in order, then any of the others in order; commas between those that are there."""
    comma = _text(", ")
    required = [text for is_required, text in pieces if is_required]
    others = [text for is_required, text in pieces if not is_required]
    if required:
        return f" {comma} ".join(required) + "".join(f" ({comma} {text})?" for text in others)
    options = [text + "".join(f" ({comma} {more})?" for more in others[i + 1 :]) for i, text in enumerate(others)]
    return f"({' | '.join(options)})?" if options else ""


_CALLS: Mapping[str, Any] = {
    "hermes": _object_call("arguments", "<tool_call>\n", "\n</tool_call>"),
    "llama3": _object_call("parameters"),
    "mistral": _object_call("arguments"),
    "pythonic": _python_call,
    "deepseek_v3": _deepseek_call,
}
_AROUND = {  # before the first call, between calls, after the last
    "hermes": ("", "\n", ""),
    "llama3": ("", "; ", ""),
    "mistral": (f"{TOOL_CALLS}[", ", ", "]"),
    "pythonic": ("[", ", ", "]"),
    "deepseek_v3": (CALLS_BEGIN, "\n", CALLS_END),
}


def _written(parts: Sequence[Part], ids: Mapping[str, int]) -> str:
    """In Lark: rules by name, text as strings, markers that are special tokens by number."""
    written = []
    for part in parts:
        if isinstance(part, _Rule):
            written.append(str(part))
            continue
        written += _marked(part, [marker for marker in _MARKERS if marker in ids and marker in part], ids)
    return " ".join(written) or _text("")


def _marked(text: str, markers: list[str], ids: Mapping[str, int]) -> list[str]:
    if not text:
        return []
    if not markers:
        return [_text(text)]
    marker, *others = markers
    written: list[str] = []
    for i, piece in enumerate(text.split(marker)):
        if i:
            written.append(f"<[{ids[marker]}]>")
        written += _marked(piece, others, ids)
    return written


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
