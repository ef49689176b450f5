"""YAML file -> pydantic model, with errors that name file, key and what would be right."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)


class SettingsError(Exception):
    """One line per problem."""


def read_settings(path: str | Path, model: type[M]) -> M:
    """Raises SettingsError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f"{path}: there is no such file; name an existing YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return validate_settings(data if data is not None else {}, model, str(path))


def validate_settings(data: Any, model: type[M], origin: str) -> M:
    """`origin` names where the data came from, for the error. Raises SettingsError."""
    if not isinstance(data, dict):
        raise SettingsError(f"{origin}: expected keys and values at the top, found {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(e, model, origin) for e in error.errors())) from None


def _explain(error: Any, model: type[BaseModel], origin: str) -> str:
    path: Sequence[Any] = error["loc"]
    key = ".".join(str(p) for p in path) or "(top)"
    if error["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, path[:-1]))
        close = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{origin}: {key}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f", given {given!r}" if not isinstance(given, dict) else ""
    return f"{origin}: {key}: {message}{shown}"


def _fields_at(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Names of the keys that the section at `path` knows."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = _section(field.annotation) if field is not None else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            found = _section(option)
            if found is not None:
                return found
    return None
