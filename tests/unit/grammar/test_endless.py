"""A schema that asks for itself without end is known before any work, and no other is taken for one."""

from __future__ import annotations

from typing import Any

import pytest

from grammar.endless import endless

LIST = {"$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}}}
NULL = {"type": "null"}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#/anyOf/0"}]},
        {"$defs": {"a": {"$ref": "#/$defs/b~1c"}, "b/c": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"type": "object", "properties": {"a b": {"$ref": "#/properties/a%20b"}}, "required": ["a b"]},
        {**LIST, "$ref": "#/$defs/node"},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"type": "array", "prefixItems": [NULL, {"$ref": "#"}], "minItems": 2},
    ],
)
def test_endless(schema: Any) -> None:
    assert endless(schema)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        False,
        {},
        LIST,
        {"$ref": "https://example.com/a"},
        {"$ref": "#/nowhere"},
        {"$ref": "#/$defs/a", "$defs": {"a": NULL}},
        {"anyOf": [{"$ref": "#"}, NULL]},
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},  # a number fits
        {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": "array", "prefixItems": [NULL], "items": {"$ref": "#"}, "minItems": 1},
        {"$defs": {"a": {"$id": "https://example.com/a", "$ref": "#"}}, "allOf": [{"$ref": "#/$defs/a"}]},
    ],
)
def test_not_endless(schema: Any) -> None:
    assert not endless(schema)


@pytest.mark.parametrize("last", [NULL, {"$ref": "#"}])
def test_a_long_chain_is_followed_at_once(last: Any) -> None:
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}
    assert endless({"$ref": "#/$defs/d0", "$defs": {**links, "d5000": last}}) == ("$ref" in last)
