"""A chat template renders what transformers renders of it, and refuses what transformers refuses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from checkpoint.chat_template import ChatTemplate
from checkpoint.files import CheckpointError
from tests.support.checkpoints import saved_tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Says <what> it\'s like & "more" — überall',
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Ulm", "東京"]}}},
        },
    }
]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm", "n": [1, 2.5]}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "a question": [{"role": "user", "content": "Why is <the> sky\n  blue & 'wide'? 😀 "}],
    "with a system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sky": "blue"}', "name": "weather", "tool_call_id": "c1"},
    ],
    "it began to answer": [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two "}],
    "in parts": [
        {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "text", "text": "nothing "}]}
    ],
    "reasoning": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y", "reasoning": "because ", "tool_calls": None},
    ],
}
VARIABLES: tuple[dict[str, Any], ...] = (
    {},
    {"add_generation_prompt": True},
    {"tools": TOOLS, "add_generation_prompt": True},
    {"continue_final_message": True},
    {"continue_final_message": "reasoning_content"},
    {"continue_final_message": True, "add_generation_prompt": True},
    {"documents": [{"title": "T", "text": "D"}], "enable_thinking": False, "bos_token": "<b>"},
    {"documents": ["no object"]},
)
# What templates of models do, one or two things each.
TEMPLATES = {
    "turns": (
        "{{ bos_token }}{% for message in messages %}\n    {% if message['role'] == 'user' %}\n"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}\n    {%- else %}{{ message.content | trim }}{{ eos_token }}"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
    ),
    "tools and JSON": (
        "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{{ t | tojson(indent=4) }}"
        "{{ t.function.parameters | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}{% endfor %}"
        "{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls is defined %}"
        "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
        "{% for k, v in c.function.arguments | items %}{{ k }}={{ v if v is string else v | tojson }};{% endfor %}"
        "{% endfor %}{% endif %}{% endfor %}"
    ),
    "refusals": (
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
        "{{ raise_exception('Only user and assistant, not ' ~ m.role) }}{% endif %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    ),
    "namespaces and macros": (
        "{% macro show(x, depth=0) %}{% if x is mapping %}{% for k in x %}{{ k }}:{{ show(x[k], depth + 1) }},"
        "{% endfor %}{% elif x is iterable and x is not string %}[{% for y in x %}{{ show(y, depth + 1) }}{% endfor %}]"
        "{% else %}{{ x }}{% endif %}{% endmacro %}"
        "{% set ns = namespace(last=-1, text='', seen=[]) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% set ns.text = ns.text ~ show(m) %}"
        "{% endfor %}{{ ns.last }}{{ ns.text }}{{ dict(a=1, b=[2]) | tojson }}{{ dict.fromkeys(['x'], 3) }}"
    ),
    "generation": (
        "{% set before = 'b' %}{% for m in messages %}{% if loop.first %}{% set inner = 'i' %}{% endif %}"
        "{% generation %}{% set inside = m.content %}{{ inner }}{{ before }}{{ inside }}{% endgeneration %}{{ inside }}"
        "{% endfor %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}"
        "{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}"
    ),
    "the date": "{{ strftime_now('%Y') }}{% if date_string is not defined %}{% set date_string = '26 Jul' %}{% endif %}"
    "{{ date_string }}{{ messages[0].content }}",
    "thinking": (
        "{% for m in messages %}{{ m.role }}|{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.reasoning }}|"
        "{{ m.content }}{% endfor %}{% if enable_thinking is defined and enable_thinking is false %}<think></think>"
        "{% endif %}{{ documents }}"
    ),
    "parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    ),
    "slices and filters": (
        "{% for m in messages[1:] %}{{ m.role | upper }}{{ m.content | string | replace('e', 'E') | length }}"
        "{{ m.get('name', 'none') }}{{ (m.content | string).split('\\n')[-1].lstrip() }}{% endfor %}"
        "{{ messages | map(attribute='role') | join(',') }}{{ messages[::-1] | selectattr('role', 'equalto', 'user')"
        " | list | length }}{{ '%s %d' | format('a', 3) }}{{ none is none }}{{ undefined_name }}"
    ),
    "what is not defined": "{{ messages[0].nothing.at_all }}",
    "what a sandbox keeps": "{{ messages.append({}) }}{{ messages | length }}",
    "a way out": "{{ ''.__class__.__mro__ }}{{ dict.__call__.__globals__ }}",
    "a hidden name": "{% set ns = namespace() %}{% set ns._hidden = 1 %}{{ ns._hidden }}",
    "a hidden name at once": "{% set ns = namespace(_hidden=1) %}x",
    "a filter that there is not": "{{ messages | no_such_filter }}",
    "a file": "{% include 'other' %}",
}


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return saved_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def outcome(render: Any) -> str:
    try:
        return render()
    except Exception as error:  # of transformers it may have other words, and of the template the same
        said = f": {error}" if type(error).__module__.startswith("jinja2") and "namespace" not in str(error) else ""
        return f"{type(error).__name__}{said}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_renders_what_transformers_renders(wrapped: Any, name: str) -> None:
    wrapped.chat_template = TEMPLATES[name]
    ours = ChatTemplate(TEMPLATES[name], TOKENS)
    assert wrapped.special_tokens_map == TOKENS
    for (kind, chat), variables in itertools.product(CHATS.items(), VARIABLES):
        expected = outcome(lambda c=chat, v=variables: wrapped.apply_chat_template(c, tokenize=False, **v))
        assert outcome(lambda c=chat, v=variables: ours.render(c, **v)) == expected, (kind, variables)


def test_more_than_half_of_these_are_rendered_and_not_refused(wrapped: Any) -> None:
    """What the comparison above is worth."""
    rendered = [
        outcome(lambda t=t, c=c: ChatTemplate(t, TOKENS).render(c, tools=TOOLS))
        for t, c in itertools.product(TEMPLATES.values(), CHATS.values())
    ]
    assert sum("Error" not in r for r in rendered) > 0.5 * len(rendered)
    assert any(r.startswith("TemplateError: Only user") for r in rendered)


def test_the_model_goes_on_with_what_it_began(wrapped: Any) -> None:
    ours = ChatTemplate(TEMPLATES["turns"], TOKENS)
    assert ours.render(CHATS["it began to answer"], continue_final_message=True).endswith("one, two")
    assert CHATS["it began to answer"][-1]["content"] == "one, two ", "the caller's messages stay as they are"


@pytest.mark.parametrize("names", [("default",), ("default", "tool_use"), ("rag", "tool_use"), ("rag",)])
@pytest.mark.parametrize("tools", [None, [], TOOLS])
def test_of_several_templates_the_same_is_chosen(wrapped: Any, names: tuple[str, ...], tools: Any) -> None:
    stated = {name: f"{name}: {{{{ messages[0].content }}}}" for name in names}
    wrapped.chat_template = stated
    chat = CHATS["a question"]
    expected = outcome(lambda: wrapped.apply_chat_template(chat, tools=tools, tokenize=False))
    assert outcome(lambda: ChatTemplate(stated, TOKENS).render(chat, tools=tools)) == expected


@pytest.mark.parametrize("stated", [None, "", {}])
def test_none_is_none(stated: Any) -> None:
    template = ChatTemplate(stated, TOKENS)
    assert not template
    template.check()


@pytest.mark.parametrize("text", ["{% for m in messages %}{{ m", "{% generation %}", "{{ 'a' ", "{% endfor %}"])
def test_what_is_cut_short_is_named_when_it_is_loaded(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="no valid Jinja"):
        ChatTemplate({"default": "fine", "tool_use": text}, TOKENS).check()
