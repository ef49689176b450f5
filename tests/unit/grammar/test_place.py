"""Errors of schemas say where, in the client's own words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from grammar.place import place_of
from grammar.structured import Kind, Structured, StructuredError, check


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "x"}, "type"),
        ({"properties": {"type": {"type": "string"}, "a": {"type": "x"}}}, "properties.a.type"),
        (
            {"properties": {"contains": {"items": {"contains": {}}, "type": "array"}}},
            "properties.contains.items.contains",
        ),
        ({"properties": {"a": {"pattern": "b"}, "c": {"pattern": "(?=x)y"}}}, "properties.c.pattern"),
        ({"properties": {"a": {"format": "date"}, "b": {"format": "nope"}}}, "properties.b.format"),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}}, "properties.a.$ref"),
        ({"anyOf": [{"type": "string"}, {"not": {}}]}, "anyOf.1.not"),
        (
            {
                "$defs": {"a": {"oneOf": [{"type": "string"}, {"type": "string"}]}},
                "properties": {"b": {"$ref": "#/$defs/a"}},
            },
            "$defs.a.oneOf",
        ),
        ({"patternProperties": {"(": {}}}, "patternProperties"),
        ({"properties": [1]}, "properties"),
        ({"required": "a"}, "required"),
    ],
)
def test_the_keyword_that_cannot_be_used_is_found(schema: Any, place: str) -> None:
    schema = {"type": "object", **schema}
    with pytest.raises(StructuredError) as refused:
        check(Structured(Kind.JSON_SCHEMA, json.dumps(schema)))
    assert place_of(schema, str(refused.value)) == place, refused.value


def test_what_is_not_found_has_no_place_and_a_search_ends() -> None:
    assert place_of({"type": "object"}, "nothing that is there") == ""
    assert place_of({"properties": {str(i): {} for i in range(100_000)}}, "contains") == ""
