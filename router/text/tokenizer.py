"""Text in: a model's tokenizer and its chat template. Text out is in stream.py and detokenizer.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from checkpoint.generation import read_description
from checkpoint.tokenizer import load_tokenizer
from router.errors import Code, refuse
from router.text.chat import Arguments, Chat, ChatError, in_parts, native_messages, plain_messages
from router.text.control_tokens import ControlTokens
from router.text.detokenizer import TokenTexts
from router.text.encode import encode
from settings.model_path import model_name, resolve_model

log = logging.getLogger(__name__)

_SAID = "what a user says"  # to find again in what a template makes of it

# What transformers' apply_chat_template takes besides a template's variables, and so no template has.
_TEMPLATE_ARGUMENTS = frozenset(
    (
        *("conversation", "messages", "tools", "chat_template", "tokenize", "sanitize_control_tokens", "padding"),
        *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "processor_kwargs"),
    )
)


class Tokenizer:
    """A model's tokenizer and what its configuration says. Thread-safe: encoding runs beside the event loop."""

    def __init__(self, model: str, *, chat_control_tokens: bool = False) -> None:
        """`chat_control_tokens`: those that clients spell in chats are more than text.

        Raises ModelPathError or CheckpointError for a model that is not there or has no usable tokenizer.
        """
        path = resolve_model(model, weights=False)
        loaded = load_tokenizer(path)
        self.backend: Any = loaded.backend
        self.template = loaded.template
        self.texts = TokenTexts(self.backend)
        self._control = None if chat_control_tokens else ControlTokens(self.backend)
        self.name = model_name(model)
        described = read_description(path)
        own_eos = loaded.eos_token_id
        self.eos_token_ids = described.end_tokens | ({own_eos} if own_eos is not None else set())
        self.vocab_size = described.vocab_size or self.backend.get_vocab_size()
        self.context_limit_tokens = described.context_limit_tokens
        self.sampling_defaults = described.sampling
        self._tried_template: tuple[Any, bool] | None = None  # and whether it wants a content in parts
        self.longest_token_chars = max((len(token) for token in self.backend.get_vocab()), default=1)
        special = self.backend.encode("a", add_special_tokens=True).special_tokens_mask
        self.front_tokens = special.index(0) if 0 in special else 0  # that it puts before every text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return encode(self.backend, text, add_special_tokens=add_special_tokens)

    def _plainly(self, error: Exception) -> str:
        return str(error) if self._control is None else self._control.without_marks(str(error))

    def takes_long(self, chat: Chat | None) -> bool:
        """Whatever its length: something is still to be made for it."""
        control = self._control
        return chat is not None and control is not None and not control.ready and control.marked(chat) is not chat

    @property
    def template_knows_tools(self) -> bool:
        return "tools" in self._template_text()

    def _template_text(self) -> str:
        return "\n".join(self.template.texts)

    def encode_chat(self, chat: Chat, *, add_special_tokens: bool = False) -> list[int]:
        """Through the model's chat template. Raises RequestRefused if there is none, or if it refuses."""
        if not self.template:
            raise refuse(
                Code.INVALID_ARGUMENT,
                f"{self.name} has no chat template; send text or token ids (over HTTP to /v1/completions), or add "
                "chat_template.jinja to the model's directory",
                field="chat",
            )
        marked = chat if self._control is None else self._control.marked(chat)
        try:
            text = self._render(marked)
        except ChatError as error:
            raise refuse(Code.INVALID_ARGUMENT, self._plainly(error), field=error.field) from None
        except Exception as error:  # a template is a program of the model's author and may refuse roles in its own way
            why = f"the chat template refuses these messages: {self._plainly(error)}"
            raise refuse(Code.INVALID_ARGUMENT, why, field="chat") from error
        if self._control is not None and marked is not chat:
            return self._control.encode(text, add_special_tokens)
        return encode(self.backend, text, add_special_tokens=add_special_tokens)

    def _render(self, chat: Chat) -> str:
        tools, variables = chat.tools(), chat.template_kwargs()
        reserved = _TEMPLATE_ARGUMENTS.intersection(variables)
        if reserved:
            raise ChatError(
                "chat_template_kwargs_json", f"{min(reserved)} is not a variable that a request may set; leave it out"
            )

        if chat.continue_final:
            variables |= {"continue_final_message": True, "add_generation_prompt": False}
        elif chat.generation_prompt is not None:
            variables["add_generation_prompt"] = chat.generation_prompt

        def render(messages: list[Any], **more: Any) -> str:
            return self._apply(in_parts(messages) if self._wants_parts() else messages, **variables, **more)

        if not self.template_knows_tools:
            return render(plain_messages(chat.messages, tools))
        more = {"tools": tools} if tools else {}
        if not any(m.tool_calls for m in chat.messages):
            return render(native_messages(chat.messages), **more)
        for arguments in (Arguments.OBJECTS, Arguments.TEXTS):
            try:
                return render(native_messages(chat.messages, arguments), **more)
            except Exception:  # the template wants them otherwise; what it has against the rest, the last try says
                log.debug("the chat template does not take arguments as %s", arguments.name.lower(), exc_info=True)
        return render(native_messages(chat.messages, Arguments.OBJECTS_ONLY), **more)

    def _apply(self, messages: list[Any], **variables: Any) -> str:
        return self.template.render(messages, **{"add_generation_prompt": True, **variables})

    def _wants_parts(self) -> bool:
        """Many templates of models that see walk through a content's parts, and would show nothing of a string."""
        template = self.template
        if self._tried_template is None or self._tried_template[0] is not template:
            message: dict[str, Any] = {"role": "user", "content": _SAID}
            self._tried_template = template, not self._shows([message]) and self._shows(in_parts([message]))
        return self._tried_template[1]

    def _shows(self, messages: list[Any]) -> bool:
        try:
            return _SAID in self._apply(messages)
        except Exception:  # a template may refuse a chat in its own way
            return False

    @property
    def chat_template_text(self) -> str:
        """All of the model's templates, one after the other; empty if there is none."""
        return self._template_text()

    def special_ids(self, markers: Sequence[str]) -> dict[str, int]:
        """Those of the markers that are special tokens, which text leaves out unless it is told to show them."""
        added = self.backend.get_added_tokens_decoder()
        return {t.content: token_id for token_id, t in added.items() if t.special and t.content in markers}

    def build_llguidance(self) -> Any:
        """An LLTokenizer: knows the names of special tokens. Takes up to a second."""
        from llguidance import LLTokenizer

        return LLTokenizer(self.backend.to_str(), eos_token=sorted(self.eos_token_ids) or None)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=True)
