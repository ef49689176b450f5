"""Text to token ids without keeping the interpreter from everybody else: `encode` holds its lock to the end."""

from __future__ import annotations

from typing import Any

_ALONE_CHARS = 2048  # encoded in a millisecond or two


def encode(backend: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """`backend`: of the package tokenizers. Half a surrogate pair, which JSON can spell, is U+FFFD."""
    text = whole(text)
    if len(text) <= _ALONE_CHARS:
        return backend.encode(text, add_special_tokens=add_special_tokens).ids
    return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def whole(text: str) -> str:
    """The text as UTF-8 can carry it: pairs of surrogates joined, halves replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
