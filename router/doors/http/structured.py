"""`response_format` and `structured_outputs`: what the whole answer must look like."""

from __future__ import annotations

from typing import Any, Literal

from pydantic_core import to_json

from grammar.structured import Kind, Structured
from router.doors.http.errors import invalid
from router.doors.http.parse import Body


class ResponseFormat(Body):
    """Always enforced, as OpenAI does with `strict`: an answer that may differ from its schema is of no use."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    def structured(self, param: str) -> Structured | None:
        if self.type != "json_schema":
            if self.json_schema is not None:
                raise invalid(f"{param}.json_schema", f"json_schema is for type json_schema, not for {self.type}")
            return Structured(Kind.JSON_OBJECT) if self.type == "json_object" else None
        given = self.json_schema or {}
        return schema_of(given, f"{param}.json_schema")


def schema_of(given: dict[str, Any], param: str) -> Structured:
    """Of an object with name, schema, strict, description. Raises ApiError."""
    unknown = next((k for k in given if k not in ("name", "description", "schema", "strict", "type")), None)
    if unknown is not None:
        raise invalid(f"{param}.{unknown[:100]}", f"{param}.{unknown[:100]} is not a field that is known here")
    if not isinstance(given.get("schema"), dict | bool):
        raise invalid(f"{param}.schema", f"{param}.schema is missing; send a JSON Schema")
    return Structured(Kind.JSON_SCHEMA, to_json(given["schema"]).decode())


_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object")


def structured_outputs_of(given: dict[str, Any]) -> Structured:
    """vLLM's. Exactly one format; `grammar` is in llguidance's dialect of Lark. Raises ApiError."""
    param = "structured_outputs"
    for name in given:
        if name not in _STRUCTURED:
            shown = name[:100]
            raise invalid(f"{param}.{shown}", f"{param}.{shown} is not supported; use one of {', '.join(_STRUCTURED)}")
    asked = {k: v for k, v in given.items() if v is not None and v is not False}
    if len(asked) != 1:
        raise invalid(param, f"{param} has {len(asked)} formats; send exactly one of {', '.join(_STRUCTURED)}")
    ((kind, value),) = asked.items()
    match kind, value:
        case "json", str():
            return Structured(Kind.JSON_SCHEMA, value)
        case "json", dict() | True:
            return Structured(Kind.JSON_SCHEMA, to_json(value).decode())
        case "regex", str():
            return Structured(Kind.REGEX, value)
        case "grammar", str():
            return Structured(Kind.LARK, value)
        case "choice", list() if all(isinstance(v, str) for v in value):
            return Structured(Kind.CHOICE, options=tuple(value))
        case "json_object", True:
            return Structured(Kind.JSON_OBJECT)
    raise invalid(f"{param}.{kind}", f"{param}.{kind} has the wrong type")
