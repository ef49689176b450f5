"""JSON objects to checked values. An error names the field, what was wrong with it, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from router.doors.http.errors import ApiError, invalid


class Body(BaseModel):
    """JSON as it came: a number is no string, and a field that nobody knows is an error, not a shrug."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_MAX_KEYS = 256
_MAX_ELEMENTS = 4096  # of a list: each that does not fit is an error with a text of its own
_UNBOUNDED = ("prompt", "tokens")  # token ids
T = TypeVar("T", bound=BaseModel)


def parse(value: dict[str, Any], kind: type[T]) -> T:
    """Raises ApiError for the first thing that does not fit."""
    if len(value) > _MAX_KEYS:  # each unknown one is an error with a text of its own, of which one is shown
        raise invalid(
            None, f"the body has {len(value)} fields, the limit is {_MAX_KEYS}; docs/api.md lists what there is"
        )
    for name, given in value.items():
        if name not in _UNBOUNDED and isinstance(given, list | dict) and len(given) > _MAX_ELEMENTS:
            raise invalid(name[:100], f"{len(given)} elements, the limit is {_MAX_ELEMENTS}; send fewer")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _explained(error, kind) from None


def _explained(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    unknown = next((p for p in problems if p["type"] == "extra_forbidden" and len(p["loc"]) == 1), None)
    if unknown is not None:
        return unknown_field(str(unknown["loc"][0]), kind.model_fields)
    # Of a union every alternative complains; the one that got furthest into the value is the one that was meant.
    problem = max(problems, key=lambda p: len(p["loc"]))
    param = _path(problem["loc"])
    if problem["type"] == "missing":
        return invalid(param, f"{param} is missing", "missing_required_parameter")
    if problem["type"] == "extra_forbidden":
        return invalid(param, f"{param} is not a field that is known here; leave it out", "unknown_parameter")
    return invalid(param, f"{param}: {problem['msg'][0].lower()}{problem['msg'][1:]}", "invalid_type")


def unknown_field(name: str, known: Iterable[str]) -> ApiError:
    name = name[:100]
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}?" if close else "leave it out; docs/api.md lists what there is"
    return invalid(name, f"unknown field {name!r}: {hint}", "unknown_parameter")


def _path(loc: tuple[int | str, ...]) -> str:
    """messages.0.content.list[...] -> messages[0].content: names of alternatives are not the client's."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "none") and part[0].islower():
            path += f".{part}" if path else part
    return path
