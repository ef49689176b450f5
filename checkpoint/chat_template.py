"""A model's chat template, rendered as transformers renders it, without transformers: the same sandbox, the same
filter, functions and tags, the same variables. The tests compare.

    the text      of a file or of tokenizer_config.json; some models have several, by name
    parsed        when the model is loaded, so that one which is cut short is named then and not with every chat
    compiled      when it is first used
    rendered      for each chat. A template is a program of the model's author: it may raise what it likes
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, TemplateSyntaxError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from checkpoint.files import CheckpointError, first_line

_WITH_TOOLS, _DEFAULT = "tool_use", "default"
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "  # a template may trim the blank, or not
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """`stated`: one text, texts by name, or nothing; false where there is nothing. Thread-safe."""

    def __init__(self, stated: str | Mapping[str, str] | None, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: by the names that a template knows them by, as bos_token."""
        self.stated = stated or ""
        self.special_tokens = dict(special_tokens)
        self._compiled: dict[str, Template] = {}

    def __bool__(self) -> bool:
        return bool(self.stated)

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.stated,) if isinstance(self.stated, str) else tuple(self.stated.values())

    def check(self) -> None:
        """Raises CheckpointError for what is no Jinja."""
        for text in self.texts:
            try:
                _environment().parse(text)
            except (TemplateSyntaxError, RecursionError) as error:
                raise CheckpointError(
                    f"the chat template is no valid Jinja ({first_line(error)}), perhaps cut short; "
                    "download or copy chat_template.jinja (or tokenizer_config.json) again"
                ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Any = None,
        add_generation_prompt: Any = False,
        continue_final_message: Any = False,
        **variables: Any,
    ) -> str:
        """`messages`, and all the rest, of what JSON can say. Raises whatever the template raises."""
        text = self._chosen(tools)
        if not messages:
            raise ValueError("a chat template needs at least one message")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message excludes add_generation_prompt; set that one to false")
        template = self._template(text)
        if documents is not None and any(not isinstance(document, dict) for document in documents):
            raise TypeError("documents must be a list of objects with title and text")
        chat: list[dict[str, Any]] = [{k: v for k, v in m.items() if v is not None} for m in messages]
        chat = [_with_reasoning(m) for m in chat]
        final = ""
        if continue_final_message:
            field = continue_final_message if isinstance(continue_final_message, str) else "content"
            chat, final = _marked_end(text, chat, field)
        rendered = template.render(
            {
                **self.special_tokens,
                **variables,
                "messages": chat,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return _cut_at_end(rendered, final) if continue_final_message else rendered

    def _chosen(self, tools: Any) -> str:
        stated = self.stated
        if isinstance(stated, str):
            return stated
        name = _WITH_TOOLS if tools is not None and _WITH_TOOLS in stated else _DEFAULT
        if name not in stated:
            raise ValueError(f"the model has the chat templates {sorted(stated)} and none that is the default")
        return stated[name]

    def _template(self, text: str) -> Template:
        template = self._compiled.get(text)
        if template is None:
            template = self._compiled[text] = _environment().from_string(text)
        return template


# A final message that the model is to go on with: a tag at its end finds the place in what was rendered.


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Under the name that templates read, and the one that gpt-oss' reads."""
    said = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if said is None else {"thinking": said, **message, "reasoning_content": said}


def _marked_end(text: str, chat: list[dict[str, Any]], field: str) -> tuple[list[dict[str, Any]], str]:
    """The chat with the tag in its last message, and what the tag stands behind."""
    last = dict(chat[-1])
    final: Any = last.get(field)
    if final is None:
        raise ValueError(f"continue_final_message is set, but the final message has no {field}")
    fields = [field]
    if field in _REASONING:
        fields = [name for name in _REASONING if last.get(name) == final]
    if not any(name in text for name in fields):
        raise ValueError(f"continue_final_message is {field}, which the chat template does not read")
    if isinstance(final, list | tuple):
        parts = [dict(part) for part in final]
        part = next((p for p in reversed(parts) if "text" in p), None)
        if part is None:
            raise ValueError("continue_final_message is set, but the final message has no text")
        final = part["text"]
        part["text"] = final + _CONTINUED
        last[field] = parts
    else:
        for name in fields:
            last[name] = last[name] + _CONTINUED
    return [*chat[:-1], last], final


def _cut_at_end(rendered: str, final: str) -> str:
    tag = _CONTINUED.strip()
    if final.strip() not in rendered or tag not in rendered:
        raise ValueError("continue_final_message is set, but the chat template changes or leaves out the final message")
    at = rendered.rindex(tag)
    kept = rendered[:at]
    return kept if rendered[at : at + len(_CONTINUED)] == _CONTINUED else kept.rstrip()


# The environment.


class _Generation(Extension):
    """{% generation %}: marks for training what the model said. Here it is what it encloses."""

    tags = {"generation"}  # noqa: RUF012 (as the library has it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _enclosed(self, context: Any, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """In place of the class, through which a template would reach what the sandbox keeps from it."""

    def __call__(self, *args: Any, **more: Any) -> dict[Any, Any]:
        return dict(*args, **more)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Takes no names that begin with an underscore."""

    def __init__(*args: Any, **more: Any) -> None:  # `self` may be one of the names
        self, rest = args[0], args[1:]
        attributes: dict[Any, Any] = dict(*rest, **more)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)  # type: ignore[arg-type]

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")


def _raise_exception(message: Any) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes what means something in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    environment.globals.update(functions)
    return environment
