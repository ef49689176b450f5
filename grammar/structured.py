"""What a whole answer must look like, as a value; its translation into a grammar of llguidance; the limits of both.

The router checks a format before any work (`check`); a worker compiles the same text under the same limits, so what the
router let through compiles. llguidance is imported when it is needed: a machine that only checks the engine has none.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass
from typing import Any

from grammar.endless import endless

MAX_STRUCTURED_BYTES = 256 << 10  # of a schema, regex or grammar, or of all options
MAX_CHOICES = 1024
# Recursive descent in the libraries below us: a thousand would still fit their stacks, and nobody nests so deep.
_MAX_NESTING = 100
_MAX_DEFINITIONS = 1000  # compiling terminals takes time that grows with their square
_DEFINITION = re.compile(r"^[ \t]*[?!]*\w+[^:\n]*:", re.MULTILINE)
# Runs of blanks between JSON tokens end: a small model that likes them would otherwise never come to the point.
# So do numbers: a grammar always allows another digit. Longer than any that a double can tell from its neighbours.
MAX_NUMBER_CHARACTERS = 40
JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"


class Kind(enum.StrEnum):
    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    LARK = "lark"
    CHOICE = "choice"


@dataclass(frozen=True, slots=True)
class Structured:
    """Fields and meaning as StructuredOutput in generate.proto. Hashable: compiled grammars are cached by it."""

    kind: Kind
    text: str = ""  # the schema, the regex or the grammar
    options: tuple[str, ...] = ()  # of a choice

    @property
    def writes_json(self) -> bool:
        """All of the answer, or parts of it."""
        return self.kind in (Kind.JSON_SCHEMA, Kind.JSON_OBJECT) or (self.kind is Kind.LARK and "%json" in self.text)

    @property
    def size_bytes(self) -> int:
        return len(self.text.encode(errors="replace")) + sum(len(o.encode(errors="replace")) for o in self.options)


class StructuredError(ValueError):
    """The format cannot be used; the message says why."""


def limits() -> Any:
    """What one grammar may cost. A step's fuel bounds a mask to tens of milliseconds, a state is 1-2 KB of memory."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def check_size(structured: Structured) -> None:
    """What needs no library. Raises StructuredError."""
    if structured.size_bytes > MAX_STRUCTURED_BYTES:
        raise StructuredError(f"it has {structured.size_bytes} bytes, the limit is {MAX_STRUCTURED_BYTES}; simplify it")
    if structured.kind is Kind.CHOICE:
        if not structured.options:
            raise StructuredError("there is nothing to choose from; send at least one option")
        if len(structured.options) > MAX_CHOICES:
            raise StructuredError(f"{len(structured.options)} options, the limit is {MAX_CHOICES}; send fewer")
        if not all(structured.options):
            raise StructuredError("an option is empty; leave it out")
    elif structured.kind is not Kind.JSON_OBJECT and not structured.text.strip():
        raise StructuredError("it is empty; send one, or leave `structured` out for free text")
    if structured.kind is Kind.LARK:
        definitions = len(_DEFINITION.findall(structured.text))
        if definitions > _MAX_DEFINITIONS:
            raise StructuredError(f"it defines {definitions} names, the limit is {_MAX_DEFINITIONS}; simplify it")
    depth = _nesting(structured.text)
    if depth > _MAX_NESTING:
        raise StructuredError(f"it nests {depth} brackets, the limit is {_MAX_NESTING}; simplify it")


def _nesting(text: str) -> int:
    """Deepest nesting of brackets, wherever they stand: strings and escapes are not told apart, which errs upwards."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(depth - 1, 0)
    return deepest


def llguidance_grammar(structured: Structured) -> str:
    """The grammar as llguidance takes it. Raises StructuredError for what is not even a text of its kind."""
    from llguidance import LLMatcher

    match structured.kind:
        case Kind.JSON_OBJECT:
            return _json_grammar({"type": "object"})
        case Kind.JSON_SCHEMA:
            return _json_grammar(parse_schema(structured.text))
        case Kind.REGEX:
            return LLMatcher.grammar_from_regex(structured.text)
        case Kind.LARK:
            return LLMatcher.grammar_from_lark(structured.text)
        case Kind.CHOICE:
            return LLMatcher.grammar_from_regex("|".join(map(_literally, structured.options)))


def parse_schema(text: str) -> dict[str, Any]:
    """Raises StructuredError."""
    try:
        schema = json.loads(text, parse_int=_exact_int)
    except StructuredError:
        raise
    except (ValueError, RecursionError) as error:
        raise StructuredError(f"it is not JSON: {error}") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise StructuredError("a schema is a JSON object, or true")
    return schema


def _exact_int(digits: str) -> int:
    """llguidance computes with doubles: beyond them it would let other numbers through than the schema names."""
    number = int(digits) if len(digits) < 20 else 1 << 60
    if abs(number) > 1 << 53:
        raise StructuredError(
            f"the number {digits[:40]} is beyond 2^53 and would not be exact; use a string, or a bound"
        )
    return number


def _literally(text: str) -> str:
    """A regex of exactly this text. Lark's strings do not know every character."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _json_grammar(schema: Any) -> str:
    from llguidance import LLMatcher

    # Overrides, not defaults: a schema's own "x-guidance" must not switch a check off.
    try:
        return LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_pattern": JSON_WHITESPACE, "lenient": False}
        )
    except (ValueError, RecursionError) as error:
        raise StructuredError(first_words(str(error))) from None


def check_end(structured: Structured) -> None:
    """Whether an answer can end. Raises StructuredError; what is no schema at all is told by `check`."""
    if structured.kind is not Kind.JSON_SCHEMA or '"$ref"' not in structured.text:
        return
    try:
        schema = parse_schema(structured.text)
    except StructuredError:
        return
    if endless(schema):
        raise StructuredError(
            "it asks for itself without end, so no value fits it; give what it refers to another way to end, such as "
            "null, or do not require it"
        )


def check(structured: Structured, tokenizer: Any = None) -> None:
    """Whether it compiles. `tokenizer`: an LLTokenizer; without one, names of special tokens go unchecked.

    Raises StructuredError with the cause. Takes milliseconds, and for the largest hundreds: beside the event loop.
    """
    from llguidance import LLMatcher

    check_size(structured)
    check_end(structured)
    grammar = llguidance_grammar(structured)
    try:
        error = LLMatcher.validate_grammar(grammar, tokenizer, limits=limits())
    except BaseException as panic:  # how Rust's panics arrive here; they are of no public type
        if isinstance(panic, KeyboardInterrupt | SystemExit):
            raise
        raise StructuredError(f"the grammar library failed: {first_words(str(panic))}") from None
    if error and not error.startswith("WARNING"):
        raise StructuredError(first_words(error))


def first_words(error: str) -> str:
    """llguidance adds excerpts and internal state, over many lines."""
    return " ".join(error.split())[:300]
