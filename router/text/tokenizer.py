"""Text in and out: tokenizer, chat template, incremental detokenization, stop strings.

Detokenization never splits a character: text appears with the token that completes it. Text that may be the start of a
stop string is held back until it is certain.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from router.errors import Code, refuse
from router.text.chat import Chat, ChatError, native_messages, plain_messages
from settings.model_path import resolve_model
from settings.tokenizer import load_tokenizer

# What transformers' apply_chat_template takes besides a template's variables. `chat_template` would be a program.
_TEMPLATE_ARGUMENTS = frozenset(
    (
        *("conversation", "messages", "tools", "chat_template", "tokenize", "sanitize_control_tokens", "padding"),
        *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "processor_kwargs"),
    )
)


class Tokenizer:
    """A model's tokenizer and what its configuration says. Thread-safe: encoding runs beside the event loop."""

    def __init__(self, model: str) -> None:
        """Raises ModelPathError, OSError or ValueError for a model that is not there or has no fast tokenizer."""
        path = resolve_model(model)
        self._wrapped: Any = load_tokenizer(path)
        self.backend: Any = getattr(self._wrapped, "backend_tokenizer", None)
        if self.backend is None:
            raise ValueError(f"{model} has no fast tokenizer (tokenizer.json); convert it with transformers")
        self.name = Path(path).name
        self.vocab_size, self.context_limit_tokens, eos = _read_config(path)
        own_eos = self._wrapped.eos_token_id
        self.eos_token_ids = frozenset(eos) | ({own_eos} if own_eos is not None else set())
        self.vocab_size = self.vocab_size or len(self._wrapped)
        self.longest_token_chars = max((len(token) for token in self._wrapped.get_vocab()), default=1)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text).ids

    @property
    def template_knows_tools(self) -> bool:
        return "tools" in self._template_text()

    def _template_text(self) -> str:
        template = self._wrapped.chat_template or ""
        return template if isinstance(template, str) else "\n".join(template.values())

    def encode_chat(self, chat: Chat) -> list[int]:
        """Through the model's chat template. Raises RequestRefused if there is none, or if it refuses."""
        if not self._wrapped.chat_template:
            raise refuse(
                Code.INVALID_ARGUMENT, f"{self.name} has no chat template; send text or token ids", field="chat"
            )
        try:
            text = self._render(chat)
        except ChatError as error:
            raise refuse(Code.INVALID_ARGUMENT, str(error), field=error.field) from None
        except Exception as error:  # a template is a program of the model's author and may refuse roles in its own way
            raise refuse(
                Code.INVALID_ARGUMENT, f"the chat template refuses these messages: {error}", field="chat"
            ) from error
        return self.backend.encode(text, add_special_tokens=False).ids

    def _render(self, chat: Chat) -> str:
        tools, variables = chat.tools(), chat.template_kwargs()
        reserved = _TEMPLATE_ARGUMENTS.intersection(variables)
        if reserved:
            raise ChatError(
                "chat_template_kwargs_json", f"{min(reserved)} is not a variable that a request may set; leave it out"
            )

        def render(messages: list[Any], **more: Any) -> str:
            arguments = {"add_generation_prompt": True, **variables, **more, "tokenize": False}
            return self._wrapped.apply_chat_template(messages, **arguments)

        if not self.template_knows_tools:
            return render(plain_messages(chat.messages, tools))
        more = {"tools": tools} if tools else {}
        try:
            return render(native_messages(chat.messages), **more)
        except ChatError:
            raise
        except Exception:
            if not any(m.tool_calls for m in chat.messages):
                raise
            return render(native_messages(chat.messages, arguments_as_text=True), **more)

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


def _read_config(path: str) -> tuple[int | None, int | None, list[int]]:
    """Vocabulary size, context limit and end-of-sequence ids, where the checkpoint's files say so."""

    def load(name: str) -> dict[str, Any]:
        file = Path(path) / name
        return json.loads(file.read_text()) if file.exists() else {}

    config = load("config.json")
    config = {**config, **config.get("text_config", {})}
    generation = load("generation_config.json")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = eos if isinstance(eos, list) else [eos] if eos is not None else []
    return config.get("vocab_size"), config.get("max_position_embeddings"), ids


class TextStream:
    """One answer's text. `push` returns what became certain; `stopped` is set when a stop string is complete.

    `shown`: special tokens that are part of the text, by name; the others are silent.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], min_tokens: int = 0, shown: Mapping[str, int] | None = None
    ) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = tokenizer.backend
        self._new_stream: Callable[[], Any] = partial(DecodeStream, skip_special_tokens=True)
        self._stream: Any = self._new_stream()
        self._undecided: list[int] = []  # tokens whose characters are not complete yet
        self._stop = tuple(s for s in stop if s)
        self._longest = max((len(s) for s in self._stop), default=0)
        self._min_tokens = min_tokens
        self._shown = {token_id: name for name, token_id in (shown or {}).items()}
        self._count = 0
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        self._count += 1
        marker = self._shown.get(token_id)
        if marker is not None:
            piece = self._decoded_rest() + marker
            self._stream = self._new_stream()
        else:
            piece = self._stream.step(self._backend, token_id)
        if piece is None:
            self._undecided.append(token_id)
            return ""
        self._undecided.clear()
        return piece if not self._stop else self._scan(piece)

    def flush(self) -> str:
        """What is left at the end: held-back text, and bytes that never became a character."""
        if self.stopped:
            return ""
        rest = self._held + self._decoded_rest()
        self._held = ""
        self._undecided.clear()
        return rest

    def _decoded_rest(self) -> str:
        return self._backend.decode(self._undecided, skip_special_tokens=True) if self._undecided else ""

    def _scan(self, piece: str) -> str:
        text = self._held + piece
        if self._count > self._min_tokens:
            found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
            if found:
                self.stopped = True
                self._held = ""
                return text[: min(found)]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_start(self, text: str) -> int:
        """Length of the longest tail that some stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return length
        return 0
