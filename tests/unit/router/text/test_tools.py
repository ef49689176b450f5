"""Tool calls of five families: read the same in any pieces, text unharmed, nothing lost; demanded by grammar."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from grammar.structured import check, llguidance_grammar
from router.text.encode import whole
from router.text.tools import families
from router.text.tools.demand import DemandError, calls_or, demand_calls
from router.text.tools.events import Call, Text, collect
from router.text.tools.families import (
    ARGS,
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    FAMILIES,
    PYTHON_TAG,
    SEPARATOR,
    TOOL_CALLS,
    choose_family,
)

KNOWN = frozenset(["f", "get_weather"])


def read(family: str, text: str, cuts: list[int] | None = None) -> tuple[str, list[Call]]:
    parser = FAMILIES[family].parser(KNOWN)
    places = sorted({min(c, len(text)) for c in cuts or []})
    events = []
    for start, end in zip([0, *places], [*places, len(text)], strict=True):
        events += parser.push(text[start:end])
    return collect([*events, *parser.finish()])


def deepseek(name: str, arguments: str) -> str:
    return f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}"


CASES: list[tuple[str, str, str, list[Call]]] = [
    (
        "hermes",
        'Sure.\n<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "x}\\"</tool_call>"}]}}\n</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "g"}</tool_call>\n',
        "Sure.\n",
        [Call("f", '{"a": [1, {"b": "x}\\"</tool_call>"}]}'), Call("g", "{}")],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [Call("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call> Done.', " Done.", [Call("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "1\n2"}}</tool_call>', "", [Call("f", '{"a": "1\\n2"}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut', "", [Call("f", '{"a": "cut')]),
    ("hermes", '<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
    ("hermes", '<tool_call>{"name": 7}</tool_call>', '<tool_call>{"name": 7}</tool_call>', []),
    ("hermes", '<tool_ <tool_call>no <tool_call>{"name":"f"}</tool_call>', "<tool_ <tool_call>no ", [Call("f", "{}")]),
    (
        "llama3",
        '{"name": "f", "parameters": {"a": 1}}; {"name": "get_weather", "parameters": {}}',
        "",
        [Call("f", '{"a": 1}'), Call("get_weather", "{}")],
    ),
    ("llama3", PYTHON_TAG + '{"type": "function", "name": "zz", "parameters": {}}', "", [Call("zz", "{}")]),
    ("llama3", ' {"name": "zz", "parameters": {"a": 1}}', ' {"name": "zz", "parameters": {"a": 1}}', []),
    ("llama3", 'I say {"name": "f", "parameters": {}}', 'I say {"name": "f", "parameters": {}}', []),
    ("llama3", PYTHON_TAG + "search.call(x)", PYTHON_TAG + "search.call(x)", []),
    (
        "mistral",
        TOOL_CALLS + ' [{"name": "f", "arguments": {"a": 1}, "id": "x"}, {"name": "g", "arguments": {}}]',
        "",
        [Call("f", '{"a": 1}'), Call("g", "{}")],
    ),
    (
        "mistral",
        f'Hm {TOOL_CALLS}f{ARGS}{{"a": 1}}{TOOL_CALLS}g{{"b": 2}}',
        "Hm ",
        [Call("f", '{"a": 1}'), Call("g", '{"b": 2}')],
    ),
    ("mistral", TOOL_CALLS + "[1]", TOOL_CALLS + "[1]", []),
    (
        "pythonic",
        '[f(a=1, b="x)]", c=[True, None, {"k": -1.5}]), get_weather()]\n',
        "",
        [Call("f", '{"a": 1, "b": "x)]", "c": [true, null, {"k": -1.5}]}'), Call("get_weather", "{}")],
    ),
    ("pythonic", "[zz(a=1)]", "[zz(a=1)]", []),
    ("pythonic", "[f(1)]", "[f(1)]", []),
    ("pythonic", "[f(a=open('x'))]", "[f(a=open('x'))]", []),
    ("pythonic", "[1, 2] is a list", "[1, 2] is a list", []),
    (
        "deepseek_v3",
        "Hi" + CALLS_BEGIN + deepseek("f", "{}") + "\n" + deepseek("g", '{"a": 1}') + CALLS_END,
        "Hi",
        [Call("f", "{}"), Call("g", '{"a": 1}')],
    ),
    (
        "deepseek_v3",
        f'{CALLS_BEGIN}{CALL_BEGIN}f{SEPARATOR}{{"a": 1}}{CALL_END}{CALLS_END}',
        "",
        [Call("f", '{"a": 1}')],
    ),
    ("deepseek_v3", f"{CALLS_BEGIN} no {CALLS_END}", f"{CALLS_BEGIN} no {CALLS_END}", []),
]  # fmt: skip


@pytest.mark.parametrize(("family", "answer", "text", "calls"), CASES)
def test_calls_are_found(family: str, answer: str, text: str, calls: list[Call]) -> None:
    assert read(family, answer) == (text, calls)
    assert read(family, answer, list(range(len(answer)))) == (text, calls)


def test_arguments_come_while_they_are_written() -> None:
    parser = FAMILIES["hermes"].parser(KNOWN)
    assert parser.push('<tool_call>{"name": "f", ') == []
    name, first = parser.push('"arguments": {"city": "K')
    assert name.name == "f"  # type: ignore[union-attr]
    assert first.text == '{"city": "K'  # type: ignore[union-attr]
    assert [e.text for e in parser.push('öln"}')] == ['öln"}']  # type: ignore[union-attr]


PIECES = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "{",
        "}",
        "[",
        "]",
        '"',
        '"name": "f"',
        '"arguments": ',
        '"parameters": ',
    ),
    *('{"name": "f", "arguments": {"a": 1}}', '{"name": "zz", "parameters": {}}', ", ", "; ", "\n", " ", "text", "f("),
    *("a=1", ")", "[f(a='x')]", PYTHON_TAG, TOOL_CALLS, ARGS, CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR),
    *("function", "```json\n", "```", "\\", "null", "-1.5e3", "\\u00e9", "é"),
]
answers = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=14).map("".join)


@given(st.sampled_from(sorted(FAMILIES)), answers, st.lists(st.integers(0, 150), max_size=12))
def test_the_pieces_do_not_matter(family: str, answer: str, cuts: list[int]) -> None:
    assert read(family, answer, cuts) == read(family, answer)


@given(st.sampled_from(sorted(FAMILIES)), answers)
def test_what_is_no_call_is_text_and_nothing_is_lost(family: str, answer: str) -> None:
    text, calls = read(family, answer)
    if not calls:
        assert text == answer
    rest = iter(answer)
    assert all(c in rest for c in text), "in order, and nothing that was not there"


@given(st.sampled_from(sorted(FAMILIES)), st.text(alphabet=st.characters(exclude_characters="<[{"), max_size=60))
def test_plain_text_passes_at_once(family: str, answer: str) -> None:
    parser = FAMILIES[family].parser(KNOWN)
    events = parser.push(answer)
    said = "".join(e.text for e in events if isinstance(e, Text))
    assert said == answer or not answer.strip()
    assert collect([*events, *parser.finish()]) == (answer, [])


def test_deep_and_long_answers_are_harmless() -> None:
    for family in FAMILIES:
        for answer in ("[f(a=" + "[" * 5000, '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 5000, "{" * 5000):
            text, calls = read(family, answer)
            assert len(text) + sum(len(c.arguments) for c in calls) > 4000


def test_the_family_is_found_in_the_template() -> None:
    assert choose_family("auto", "{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert choose_family("auto", "{{ tools }}[TOOL_CALLS]") == "mistral"
    assert choose_family("auto", "{{ tools }}<|python_tag|>") == "llama3"
    assert choose_family("auto", "{{ tools }}<｜tool▁calls▁begin｜>") == "deepseek_v3"
    assert choose_family("auto", "{{ messages }}") == "hermes", "tools were written into the prompt in its form"
    assert choose_family("auto", "{{ tools }} in a way of its own") == ""
    assert (choose_family("none", "<tool_call>"), choose_family("pythonic", "<tool_call>")) == ("", "pythonic")


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "days": {"type": "integer"},
                    "city": {"type": "string"},
                    "unit": {"$ref": "#/$defs/unit"},
                },
                "required": ["city"],
                "additionalProperties": False,
                "$defs": {"unit": {"enum": ["C", "F"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "f"}},
]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", ["", "f", "get_weather"])
@pytest.mark.parametrize("parallel", [True, False])
def test_demanded_calls_are_a_grammar(family: str, name: str, parallel: bool) -> None:
    structured = demand_calls(family, TOOLS, name=name, parallel=parallel)
    check(structured)
    assert ("*" in structured.text.splitlines()[-1]) is parallel


def test_a_demand_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(DemandError, match="no tool 'g'"):
        demand_calls("hermes", TOOLS, name="g")
    with pytest.raises(DemandError, match="not known"):
        demand_calls("", TOOLS)
    bad = [{"function": {"name": "f", "parameters": {"properties": {"a-b": {}}}}}]
    with pytest.raises(DemandError, match="no Python name"):
        demand_calls("pythonic", bad)
    assert json.loads('{"a-b": 1}')
    check(demand_calls("hermes", bad))


def test_special_tokens_are_named_by_number() -> None:
    text = demand_calls("mistral", TOOLS, special_ids={TOOL_CALLS: 5}).text
    assert text.splitlines()[-1].startswith('start: <[5]> "[" call')


ANSWERS = {  # of one call of f, as each family writes it
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    "llama3": '{"name": "f", "parameters": {"a": 1}}',
    "mistral": '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]',
    "pythonic": "[f(a=1)]",
    "deepseek_v3": CALLS_BEGIN + deepseek("f", '{"a": 1}') + CALLS_END,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parallel", [True, False])
def test_beside_a_format_calls_can_be_made_and_what_is_said_has_it(family: str, parallel: bool) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer", "uniqueItems": True}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    schema = {"type": "object", "properties": {"color": {"enum": ["red"]}}, "required": ["color"]}
    structured = calls_or(family, tools, schema, parallel=parallel)
    check(structured)
    tokenizer = LLTokenizer("byte")
    answers = {ANSWERS[family]: True, '{"color":"red"}': True, '{"color":"blue"}': False, "Well": False, "": False}
    for answer, fits in answers.items():
        matcher = LLMatcher(tokenizer, llguidance_grammar(structured), log_level=0)
        consumed = all(matcher.consume_token(t) for t in tokenizer.tokenize_str(answer))
        assert (consumed and matcher.is_accepting()) == fits, answer
    assert [call.name for call in read(family, ANSWERS[family])[1]] == ["f"]
    assert read(family, '{"color":"red"}') == ('{"color":"red"}', [])


def test_half_a_character_can_be_written_out() -> None:
    """JSON and Python can spell half a surrogate pair, UTF-8 cannot."""
    call = ast.parse('f(a="\\ud800")', mode="eval").body
    assert families._python_call(call, frozenset({"f"})) == ("f", '{"a": "\ufffd"}')
    assert whole("a\ud83d\ude00b\ud800") == "a\U0001f600b\ufffd"
