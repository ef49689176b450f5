"""Which formats are refused, with what words; and that none of them takes the process along."""

from __future__ import annotations

import json

import pytest

from grammar.structured import Kind, Structured, StructuredError, check, check_size
from grammar.threads import deep_threads


def test_what_can_be_used_passes() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for structured in (
        Structured(Kind.JSON_SCHEMA, json.dumps(schema)),
        Structured(Kind.JSON_SCHEMA, "true"),
        Structured(Kind.JSON_OBJECT),
        Structured(Kind.REGEX, r"^\d{3}-\d{4}$"),
        Structured(Kind.LARK, 'start: "a" | word\nword: /[b-z]+/'),
        Structured(Kind.CHOICE, options=("yes", "no", 'with "quotes"', "a\\b", "line\nbreak", "größer", "\x01")),
    ):
        check(structured)


@pytest.mark.parametrize(
    ("structured", "words"),
    [
        (Structured(Kind.JSON_SCHEMA, "{"), "not JSON"),
        (Structured(Kind.JSON_SCHEMA, '{"enum": [9007199254740993]}'), "9007199254740993 is beyond"),
        (Structured(Kind.JSON_SCHEMA, '{"maximum": %s}' % ("9" * 5000)), "is beyond"),
        (Structured(Kind.JSON_SCHEMA, "[]"), "a schema is a JSON object"),
        (Structured(Kind.JSON_SCHEMA, '{"type": "strin"}'), "Invalid type"),
        (Structured(Kind.JSON_SCHEMA, '{"type": "string", "minLength": 3, "maxLength": 2}'), "Unsatisfiable"),
        (Structured(Kind.JSON_SCHEMA, '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Structured(Kind.JSON_SCHEMA, '{"uniqueItems": true, "x-guidance": {"lenient": true}}'), "uniqueItems"),
        (Structured(Kind.JSON_SCHEMA, '{"$ref": "https://example.com/schema"}'), "example.com"),
        (Structured(Kind.JSON_SCHEMA, '{"$ref": "#"}'), "asks for itself without end"),
        (Structured(Kind.REGEX, "[a-"), "unclosed character class"),
        (Structured(Kind.REGEX, "(?=a)b"), "look-ahead"),
        (Structured(Kind.LARK, "start: nothing"), "unknown name"),
        (Structured(Kind.LARK, "begin: /x/"), "start"),
        (
            Structured(Kind.LARK, "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(2000))),
            "defines 2001 names",
        ),
    ],
)
def test_what_cannot_is_refused_with_the_cause(structured: Structured, words: str) -> None:
    with pytest.raises(StructuredError, match=words):
        check(structured)


CHAINS = {
    "rules": Structured(Kind.LARK, "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(900)) + 'r900: "a"'),
    "terminals": Structured(
        Kind.LARK, "start: T0\n" + "".join(f'T{i}: (T{i + 1} | "b")* "a"\n' for i in range(900)) + 'T900: "a"'
    ),
    "references": Structured(
        Kind.JSON_SCHEMA,
        json.dumps(
            {
                "$ref": "#/$defs/d0",
                "$defs": {
                    **{f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(3000)},
                    "d3000": {"type": "string"},
                },
            }
        ),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_long_chains_do_not_overflow_the_stack(name: str) -> None:
    check_size(CHAINS[name])
    threads = deep_threads(1, "test")
    try:
        threads.submit(check, CHAINS[name]).result(60)
    finally:
        threads.shutdown()
