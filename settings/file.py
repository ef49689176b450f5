"""YAML file -> pydantic model, with errors that name file, key and what would be right.

A file is bounded in bytes, in depth, and in elements with every alias written out: "billion laughs" is an error.
"""

from __future__ import annotations

import difflib
import math
import reprlib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)

_MAX_BYTES = 256 << 10
_MAX_DEPTH = 32
_MAX_ELEMENTS = 20_000  # with every alias written out
_MAX_PROBLEMS = 20  # more are counted, not told
_SHOWN_CHARS = 200
_NEVER_SHOWN = {"sha256"}  # keys whose value may be a secret that somebody pasted there


class SettingsError(Exception):
    """One line per problem."""


def read_settings(path: str | Path, model: type[M]) -> M:
    """Raises SettingsError."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise SettingsError(f"{path}: longer than {_MAX_BYTES} bytes; name a settings file")
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise SettingsError(f"{path}: there is no such file; name an existing YAML file") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}; name a YAML file in UTF-8") from None
    try:
        content = yaml.load(text, _Loader)
    except Exception as error:  # PyYAML lets Python's own errors out: of numbers, dates, tags, too much nesting
        hint = " (an IPv6 address needs quotes)" if "::" in text else ""
        raise SettingsError(f"{path}: not valid YAML: {_one_line(error)}{hint}") from None
    return validate_settings(content if content is not None else {}, model, str(path))


def validate_settings(data: Any, model: type[M], origin: str) -> M:
    """`origin` names where the data came from, for the error. Raises SettingsError."""
    if not isinstance(data, dict):
        raise SettingsError(f"{origin}: expected keys and values at the top, found {type(data).__name__}")
    data, wrong = _as_meant(data, model, ())
    try:
        settings = model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(e, model, origin) for e in error.errors()[: _MAX_PROBLEMS + 1]]
        problems = [*(f"{origin}: {key}: {problem}" for key, problem in wrong), *problems]
    else:
        unusable = [*wrong, *_unusable(settings.model_dump(), ())]
        problems = [f"{origin}: {key}: {problem}" for key, problem in unusable]
        if not problems:
            return settings
    if len(problems) > _MAX_PROBLEMS:
        problems[_MAX_PROBLEMS:] = [f"{origin}: there are more problems; solve these first"]
    raise SettingsError("\n".join(problems))


class _Loader(yaml.SafeLoader):
    """Refuses what makes a small file large, and keys that are given twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._elements = 0
        self._sizes: dict[int, int] = {}  # elements below a node, by its identity

    def compose_node(self, parent: Any, index: Any) -> Any:
        before = self._elements
        self._depth += 1
        alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if alias:
            if id(node) not in self._sizes:
                raise yaml.constructor.ConstructorError(None, None, "an anchor that contains itself", node.start_mark)
            self._grow(self._sizes[id(node)], node)
        else:
            self._grow(1, node)
            self._sizes[id(node)] = self._elements - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        self._check_depth()
        return super().compose_mapping_node(anchor)

    def compose_sequence_node(self, anchor: Any) -> Any:
        self._check_depth()
        return super().compose_sequence_node(anchor)

    def _check_depth(self) -> None:
        if self._depth > _MAX_DEPTH:
            event: Any = self.peek_event()
            problem = f"nested deeper than {_MAX_DEPTH} levels"
            raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)

    def _grow(self, elements: int, node: Any) -> None:
        self._elements += elements
        if self._elements > _MAX_ELEMENTS:
            problem = f"more than {_MAX_ELEMENTS} elements, aliases written out"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:
            kind = node.tag.rsplit(":", 1)[-1]
            problem = f"{_shown(node.value)} is not a valid {kind}; quote it if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_number(self, node: Any) -> Any:
        if ":" in node.value:  # YAML 1.1 counts 1:30 in sixties
            problem = f"{_shown(node.value)} would be a number in base 60; quote it if it is text, an address for one"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        is_int = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    problem = f"the key {_shown(key.value)} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _as_meant(value: Any, wanted: Any, path: tuple[str, ...]) -> tuple[Any, list[tuple[str, str]]]:
    """The value for a field of type `wanted`, and (key, problem) for what pydantic would take as something else.

    A section, list or table without content is read by YAML as null: it has its defaults. A yes, no, on or off is a
    boolean, which Python counts among the numbers.
    """
    if isinstance(value, bool):
        kinds = _kinds(wanted)
        if bool not in kinds and kinds & {int, float}:
            return value, [(".".join(path), f"use a number; yes, no, on and off are booleans in YAML, given {value}")]
        return value, []
    section, wrong = _section(wanted), []
    if isinstance(value, dict) and section is not None:
        kept = {}
        for key, below in value.items():
            field = section.model_fields.get(key) if isinstance(key, str) else None
            if field is not None:
                if below is None and _has_content(field.annotation) and not field.is_required():
                    continue
                below, more = _as_meant(below, field.annotation, (*path, key))
                wrong += more
            kept[key] = below
        return kept, wrong
    inner = typing.get_args(wanted)
    if isinstance(value, dict) and inner and typing.get_origin(wanted) is dict:
        named = {}
        for key, below in value.items():
            below = {} if below is None and _section(inner[1]) is not None else below
            named[key], more = _as_meant(below, inner[1], (*path, _shown_key(key)))
            wrong += more
        return named, wrong
    if isinstance(value, (list, tuple)) and inner and typing.get_origin(wanted) in (list, tuple):
        pairs = [_as_meant(below, inner[0], (*path, str(i))) for i, below in enumerate(value)]
        return [below for below, _ in pairs], [problem for _, more in pairs for problem in more]
    return value, wrong


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that a field takes."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*(_kinds(option) for option in typing.get_args(annotation)))
    return {annotation}


def _has_content(annotation: Any) -> bool:
    """A section, a list or a table, which null is not."""
    return types.NoneType not in _kinds(annotation) and (
        _section(annotation) is not None or typing.get_origin(annotation) in (dict, list, tuple, set)
    )


def _unusable(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(key, problem) for what types let pass: infinity, which no clock can hold, and text that no system call takes."""
    if isinstance(value, float) and not math.isfinite(value):
        yield ".".join(path), f"use a finite number, given {value}"
    elif isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        yield ".".join(path), f"use text without NUL and lone surrogates, given {_shown(value)}"
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _unusable(key, (*path, _shown_key(key)))
            yield from _unusable(below, (*path, _shown_key(key)))
    elif isinstance(value, (list, tuple)):
        for index, below in enumerate(value):
            yield from _unusable(below, (*path, str(index)))


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 2 * _SHOWN_CHARS else f"{said[: 2 * _SHOWN_CHARS]}..."


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _SHOWN_CHARS

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 256 else f"a number of {x.bit_length()} bits"


def _shown(value: Any) -> str:
    return _Short().repr(value)


def _shown_key(key: Any) -> str:
    shown = key if isinstance(key, str) else _shown(key)
    return shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]}..."


def _explain(error: Any, model: type[BaseModel], origin: str) -> str:
    path: Sequence[Any] = error["loc"]
    key = ".".join(_shown_key(p) for p in path) or "(top)"
    if error["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, path[:-1]))
        close = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{origin}: {key}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    secret = bool(path) and path[-1] in _NEVER_SHOWN
    shown = f", given {_shown(given)}" if not isinstance(given, dict) and not secret else ""
    return f"{origin}: {key}: {message}{shown}"


def _fields_at(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Names of the keys that the section at `path` knows."""
    section: Any = model
    for part in path:
        if typing.get_origin(section) is dict:  # sections by name
            section = _section(typing.get_args(section)[1])
        elif section is not None:
            field = section.model_fields.get(str(part))
            annotation = field.annotation if field is not None else None
            section = annotation if typing.get_origin(annotation) is dict else _section(annotation)
    return list(getattr(section, "model_fields", ()))


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            found = _section(option)
            if found is not None:
                return found
    return None
