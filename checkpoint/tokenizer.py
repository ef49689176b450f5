"""A checkpoint's tokenizer: encoding is a function of the text, and the one that transformers computes.

1. Its files are read with suspicion first, so that what is cut short is named.
2. The class is found without importing torch where the files already say which it is: transformers' AutoTokenizer
   first imports the model's configuration class, and with that torch and its compilers: three seconds and 300 MB of a
   process that computes nothing.
3. State that a file keeps and transformers resets with each call is reset here, once: truncation and padding (left by
   whoever tokenized training data before saving), whether special tokens are split. What makes encoding random (the
   dropout of a BPE model, the sampling of a unigram model) is switched off.
4. A trial compares the raw backend, which serves, with transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoint.files import CheckpointError, check_directory, first_line, read_object, read_optional

# For these AutoTokenizer always comes to the plain class, whatever else the files say: the test compares.
_PLAIN_CLASSES = {"TokenizersBackend", "PreTrainedTokenizerFast"}
_PLAIN_MODELS = {"llama"}
_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json")
_TRIAL = ("Why is the sky blue?", "  Zwei Wörter,\n\tund 東京 😀 <s></s> don't 12345 ", "a" * 600 + " b" * 600)


def load_tokenizer(path: str) -> Any:
    """transformers' tokenizer of a directory; its `backend_tokenizer` is what serves. Raises CheckpointError."""
    directory = Path(path)
    _check_files(directory)
    plain = is_plain(directory)
    try:
        if plain:
            from transformers import PreTrainedTokenizerFast

            wrapped: Any = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            from transformers import AutoTokenizer

            wrapped = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except BaseException as panic:  # Rust's panics are of no public type
        if isinstance(panic, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise CheckpointError(
            f"the tokenizer in {directory} cannot be loaded ({type(panic).__name__}: {first_line(panic)}); download or "
            "copy its files again"
        ) from panic
    backend = getattr(wrapped, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"{directory} has no tokenizer.json, and transformers makes none of what is there; convert the tokenizer "
            "with transformers (PreTrainedTokenizerFast), and save it"
        )
    settle(wrapped, directory)
    _check_template(wrapped, directory)
    return wrapped


def settle(wrapped: Any, directory: Path) -> None:
    """Makes the backend a function of the text, and compares it with transformers. Raises CheckpointError."""
    backend = wrapped.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(getattr(wrapped, "split_special_tokens", False))
    for name in ("dropout", "alpha", "nbest_size"):
        if getattr(backend.model, name, None):
            setattr(backend.model, name, None)
            if getattr(backend.model, name, None):
                raise CheckpointError(
                    f"{directory / 'tokenizer.json'} makes encoding random ({name}), which cannot be served; remove "
                    f"{name} from its model"
                )
    for text in _TRIAL:
        for special in (True, False):
            ours = backend.encode(text, add_special_tokens=special).ids
            theirs = wrapped(text, add_special_tokens=special)["input_ids"]
            if ours != theirs or ours != backend.encode(text, add_special_tokens=special).ids:
                raise CheckpointError(
                    f"{directory / 'tokenizer.json'} encodes {text[:20]!r} in another way than transformers does, or "
                    "each time in another; save the tokenizer again with transformers"
                )


def is_plain(directory: Path) -> bool:
    """tokenizer.json is all of it, and no class of the model's own stands before it."""
    if not (directory / "tokenizer.json").exists():
        return False
    try:
        tokenizer, config = (json.loads((directory / n).read_text()) for n in ("tokenizer_config.json", "config.json"))
    except (OSError, ValueError):
        return False
    return (
        tokenizer.get("tokenizer_class") in _PLAIN_CLASSES
        and config.get("model_type") in _PLAIN_MODELS
        and "auto_map" not in tokenizer
    )


def _check_files(directory: Path) -> None:
    check_directory(directory)
    for name in _JSON:
        read_optional(directory / name)
    try:
        entries = {entry.name for entry in directory.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({error.strerror}); change its permissions") from None
    if "tokenizer.json" in entries:
        content = read_object(directory / "tokenizer.json")
        if not isinstance(content.get("model"), dict):
            raise CheckpointError(
                f"{directory / 'tokenizer.json'} has no model, so it is no tokenizer; download or copy it again"
            )
    elif not entries & {"tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt"}:
        raise CheckpointError(f"{directory} has no tokenizer.json; copy the tokenizer's files beside the weights")


def _check_template(wrapped: Any, directory: Path) -> None:
    """A chat template that cannot be parsed would refuse every chat, one by one. transformers' own compiler of them
    imports torch.
    """
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (as the library has it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    environment = Environment(extensions=[Generation, loopcontrols])  # only to parse; nothing is rendered here
    stated = wrapped.chat_template or ""
    for template in (stated,) if isinstance(stated, str) else stated.values():
        try:
            environment.parse(template)
        except (TemplateSyntaxError, RecursionError) as error:
            raise CheckpointError(
                f"the chat template in {directory} is no valid Jinja ({first_line(error)}), perhaps cut short; "
                "download or copy chat_template.jinja (or tokenizer_config.json) again"
            ) from None
