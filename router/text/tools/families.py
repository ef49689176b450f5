"""The forms in which model families write tool calls.

hermes       <tool_call>{"name": "f", "arguments": {...}}</tool_call>, among text          Hermes, Qwen, SmolLM
llama3       {"name": "f", "parameters": {...}}, perhaps after <|python_tag|>; the whole answer   Llama 3.x
mistral      [TOOL_CALLS][{"name": "f", "arguments": {...}}], or [TOOL_CALLS]f[ARGS]{...}
pythonic     [f(a=1), g(b="x")]; the whole answer                                          Llama 4, Llama 3.2 small
deepseek_v3  DeepSeek's markers around f and its arguments, V3 and V3.1
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from router.text.encode import whole
from router.text.tools.parser import Asking, Reading, ToolParser

PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS, ARGS = "[TOOL_CALLS]", "[ARGS]"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
_LONGEST_NAME = 256
_KEYS = ("arguments", "parameters")


class Hermes(ToolParser):
    def run(self) -> Reading:
        lead = ""
        while True:
            yield from self.text_until("<tool_call>", lead)
            lead = ""
            yield from self.blanks()
            if (yield from self.peek()) == "{" and (yield from self.json_call(_KEYS)):
                yield from self.blanks()
                if (yield from self.expect("</tool_call>")):
                    lead = yield from self.lead()
                    continue
            self.give_up()


class Llama3(ToolParser):
    def run(self) -> Reading:
        yield from self.blanks()
        tagged = (yield from self.peek()) == "<" and (yield from self.expect(PYTHON_TAG))
        while True:
            yield from self.blanks()
            if (yield from self.peek()) != "{":
                break
            if not (yield from self.json_call(_KEYS, known_only=not tagged)):
                break
            yield from self.blanks()
            following = yield from self.peek()
            if following == ";":
                yield from self.next()
            elif not following:
                self._read = ""
        yield from self.rest()


class Mistral(ToolParser):
    def run(self) -> Reading:
        lead = ""
        while True:
            yield from self.text_until(TOOL_CALLS, lead)
            lead = ""
            yield from self.blanks()
            is_list = (yield from self.peek()) == "["
            if (yield from self._list()) if is_list else (yield from self._named()):
                lead = yield from self.lead()
            else:
                self.give_up()

    def _list(self) -> Asking:
        yield from self.next()
        while True:
            yield from self.blanks()
            if (yield from self.peek()) != "{" or not (yield from self.json_call(_KEYS)):
                return False
            yield from self.blanks()
            following = yield from self.peek()
            if following not in (",", "]"):
                return False
            yield from self.next()
            if following == "]":
                return True

    def _named(self) -> Asking:
        name = ""
        while (c := (yield from self.peek())) and (c.isalnum() or c in "_.:-") and len(name) < _LONGEST_NAME:
            name += yield from self.next()
        if c == "[" and not (yield from self.expect(ARGS)):
            return False
        yield from self.blanks()
        if not name or (yield from self.peek()) != "{":
            return False
        return (yield from self.json_arguments(name))


class DeepSeekV3(ToolParser):
    def run(self) -> Reading:
        lead = ""
        while True:
            yield from self.text_until(CALLS_BEGIN, lead)
            lead = ""
            while (marker := (yield from self._marker())) == CALL_BEGIN and (yield from self._call()):
                self._read = ""
            if marker == CALLS_END:
                lead = yield from self.lead()
            else:
                self.give_up()

    def _marker(self) -> Any:
        yield from self.blanks()
        return (yield from self.one_of((CALL_BEGIN, CALLS_END)))

    def _call(self) -> Asking:
        name = yield from self.until(SEPARATOR, _LONGEST_NAME)
        if not name:
            return False
        fenced = (yield from self.peek()) != "{"
        if fenced:  # V3: a kind, then the name, then the arguments in a code block
            name = yield from self.until("\n", _LONGEST_NAME)
            if not name or not (yield from self.expect("```json")):
                return False
            yield from self.blanks()
        if (yield from self.peek()) != "{" or not (yield from self.json_arguments(name.strip())):
            return False
        yield from self.blanks()
        if fenced and not (yield from self.expect("```")):
            return False
        yield from self.blanks()
        return (yield from self.expect(CALL_END))


class Pythonic(ToolParser):
    """A list of calls is Python as a whole: it is passed on when it is complete."""

    def run(self) -> Reading:
        yield from self.blanks()
        if (yield from self.peek()) == "[":
            written = yield from self._list()
            calls = _python_calls(written, self._known) if written else None
            if calls:
                for name, arguments in calls:
                    self.start(name)
                    self.argue(arguments)
                yield from self.blanks()
                if not (yield from self.peek()):
                    self._read = ""
        yield from self.rest()

    def _list(self) -> Any:
        """As far as its brackets go; "" if it does not begin like a list of calls, or does not end."""
        written = quote = ""
        depth = 0
        called = False
        while True:
            c = yield from self.next()
            if not c:
                return ""
            written += c
            if not called:
                called = c == "("
                if not (called or c.isalnum() or c in "_. \n\t" or written == "["):
                    return ""
            if quote:
                if c == "\\":
                    written += yield from self.next()
                elif c == quote:
                    quote = ""
            elif c in "'\"":
                quote = c
            elif c in "([{":
                depth += 1
            elif c in ")]}":
                depth -= 1
                if depth == 0:
                    return written


_WORDS = {"true": True, "false": False, "null": None}


def _python_calls(written: str, known: frozenset[str]) -> list[tuple[str, str]] | None:
    """None: not a list of calls of known tools with plain keyword arguments."""
    try:
        parsed = ast.parse(written.strip(), mode="eval").body
        if not isinstance(parsed, ast.List):
            return None
        return [_python_call(node, known) for node in parsed.elts]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _python_call(node: ast.expr, known: frozenset[str]) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with keyword arguments")
    name = ast.unparse(node.func)
    if name not in known:
        raise ValueError("an unknown tool")
    arguments = {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if None in arguments:
        raise ValueError("unpacked arguments")
    return name, whole(json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name) if name in _WORDS:
            return _WORDS[name]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_literal(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            return {str(ast.literal_eval(k or node)): _literal(v) for k, v in zip(keys, values, strict=True)}
        case _:
            return ast.literal_eval(node)


@dataclass(frozen=True, slots=True)
class Family:
    """`markers` may be special tokens of the tokenizer: they must be part of the text that is parsed. `hints` are found
    in chat templates of models that write so.
    """

    parser: type[ToolParser]
    markers: tuple[str, ...]
    hints: tuple[str, ...]


FAMILIES: Mapping[str, Family] = {
    "deepseek_v3": Family(
        DeepSeekV3, (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR), ("<｜tool▁calls▁begin｜>",)
    ),
    "mistral": Family(Mistral, (TOOL_CALLS, ARGS), ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]")),
    "pythonic": Family(Pythonic, (), ("[func_name1(", "<|python_start|>")),
    "llama3": Family(Llama3, (PYTHON_TAG,), ("<|python_tag|>", "Environment: ipython")),
    "hermes": Family(Hermes, ("<tool_call>", "</tool_call>"), ("<tool_call>",)),
}


def choose_family(setting: str, chat_template: str) -> str:
    """`setting`: a family, "none", or "auto". "" is none: nobody knows what its models write.

    A template that does not know tools gets them in the Hermes form (router/text/chat.py), and calls are looked for
    in it.
    """
    if setting != "auto":
        return "" if setting == "none" else setting
    for name, family in FAMILIES.items():
        if any(hint in chat_template for hint in family.hints):
            return name
    return "" if "tools" in chat_template else "hermes"
