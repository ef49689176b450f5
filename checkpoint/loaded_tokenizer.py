"""What loading a tokenizer gives, however it was loaded: a backend that is a function of the text, and a template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from checkpoint.chat_template import ChatTemplate
from checkpoint.files import CheckpointError, first_line

TRIAL = ("Why is the sky blue?", "  Zwei Wörter,\n\tund 東京 😀 <s></s> don't 12345 ", "a" * 600 + " b" * 600)


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    backend: Tokenizer
    eos_token_id: int | None
    template: ChatTemplate


def settle(backend: Tokenizer, directory: Path, *, split_special_tokens: bool) -> None:
    """State that a file keeps and transformers resets with each call is reset, once: truncation and padding (left by
    whoever tokenized training data before saving), whether special tokens are split. What makes encoding random (the
    dropout of a BPE model, the sampling of a unigram model) is switched off. Raises CheckpointError.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = split_special_tokens
    for name in ("dropout", "alpha", "nbest_size"):
        if getattr(backend.model, name, None):
            setattr(backend.model, name, None)
            if getattr(backend.model, name, None):
                raise CheckpointError(
                    f"{directory / 'tokenizer.json'} makes encoding random ({name}), which cannot be served; remove "
                    f"{name} from its model"
                )
    for text in TRIAL:
        if backend.encode(text).ids != backend.encode(text).ids:
            raise CheckpointError(
                f"{directory / 'tokenizer.json'} encodes {text[:20]!r} each time in another way; save the tokenizer "
                "again with transformers"
            )


def cannot_load(directory: Path, error: BaseException) -> CheckpointError:
    """Of whatever was raised; what is not the files' doing is raised again."""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        raise error
    why = f"{type(error).__name__}: {first_line(error)}"
    return CheckpointError(f"the tokenizer in {directory} cannot be loaded ({why}); download or copy its files again")
