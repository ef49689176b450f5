"""Tokens to text, one at a time, without decoding anything twice.

A tokenizer's decoder is one of two kinds:

    by token    each token stands for bytes of its own, wherever it stands (only the first may lose its blank):
                ByteLevel; Replace, ByteFallback, Fuse, Strip as in Llama 2, Mistral, Gemma; Metaspace; WordPiece.
                A table of the tokens that were met, and at most three bytes that wait for the rest of a character.
    by window   what a token becomes depends on its neighbours: BPEDecoder, CTC, what is not known here.
                The last few tokens are decoded again with each new one.

Both hold a bound: a UTF-8 character has at most four bytes, so what is no character after that will never be one and
becomes U+FFFD. A decoder whose whole text marks every byte of a run that holds one broken byte (ByteFallback) is not
followed in that: characters that were complete stay, as they have been sent.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

BROKEN = "\ufffd"
_EACH_BYTE = "diptych-each-byte"  # an error handler: one U+FFFD for each byte, as ByteFallback has it
_MAX_CHARACTER_BYTES = 4
_WINDOW = 8  # tokens that are decoded again: what they become does not depend on those before
_ANCHOR = "a"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return BROKEN * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class Detokenizer(Protocol):
    """One text. Tokens that are not shown, or that the vocabulary does not have, are no part of it."""

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        ...

    @property
    def incomplete(self) -> str:
        """What would be shown of an incomplete character if the text ended here."""
        ...

    def mark(self, text: str) -> str:
        """Text that stands at this place without being a token's; with what was incomplete before it."""
        ...

    def flush(self) -> str:
        """At the end: what never became a character."""
        ...


class TokenTexts:
    """What the tokens of one tokenizer stand for. Shared by all streams; grows up to the vocabulary."""

    def __init__(self, backend: Any) -> None:
        """`backend`: a tokenizers.Tokenizer."""
        self.backend = backend
        self._decoder: Any = backend.decoder
        self._added = backend.get_added_tokens_decoder()
        self.special_names = {token_id: t.content for token_id, t in self._added.items() if t.special}
        self._silent = set(self.special_names.values())
        parts = _parts(self._decoder)
        self._kinds = [part["type"] for part in parts]
        self.strip = _strip_at_start(parts)  # None: this decoder needs a window
        self.errors = _EACH_BYTE if "ByteFallback" in self._kinds else "replace"
        self.whole: dict[int, str] = {}  # of tokens that are whole characters
        self._partial: dict[int, bytes] = {}  # of the others

    def stream(self, *, goes_on: bool = False) -> Detokenizer:
        """`goes_on`: other text stands before it, so that its first token keeps its blank."""
        return Windowed(self) if self.strip is None else ByToken(self, goes_on=goes_on)

    def bytes_of(self, token_id: int) -> bytes:
        """A token's own bytes, which may be a part of a character; of a special token its name."""
        added = self._added.get(token_id)
        if added is not None:
            return added.content.encode()
        token: str | None = self.backend.id_to_token(token_id)
        return b"" if token is None else self._bytes_of(token)

    def text_bytes(self, token_id: int) -> bytes:
        """What it adds to a text where it is not the first."""
        known = self._partial.get(token_id)
        if known is not None:
            return known
        whole = self.whole.get(token_id)
        if whole is not None:
            return whole.encode()
        token: str | None = self.backend.id_to_token(token_id)
        if token is None:
            return b""  # of a model whose vocabulary is padded
        data = b"" if token in self._silent else self._bytes_of(token)
        try:
            self.whole[token_id] = data.decode()
        except UnicodeDecodeError:
            self._partial[token_id] = data
        return data

    def is_shown(self, token_id: int) -> bool:
        token = self.backend.id_to_token(token_id)
        return token is not None and token not in self._silent

    def first_bytes(self, token_id: int) -> bytes:
        """The same of the first token of a text."""
        data = self.text_bytes(token_id)
        if data and not {"Metaspace", "WordPiece"}.isdisjoint(self._kinds):
            return self._decoder.decode([self.backend.id_to_token(token_id)]).encode()
        return data

    def _bytes_of(self, token: str) -> bytes:
        if "ByteLevel" in self._kinds:
            return bytes(_BYTE_OF[c] for c in token) if all(c in _BYTE_OF for c in token) else token.encode()
        if "ByteFallback" in self._kinds and _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(token[3:5])
        if self._decoder is None:
            return token.encode()
        return self._decoder.decode([_ANCHOR, token])[len(_ANCHOR) :].encode()


def _parts(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return [{"type": "None"}]
    said = json.loads(decoder.__getstate__())
    return said["decoders"] if said["type"] == "Sequence" else [said]


def _strip_at_start(parts: Sequence[dict[str, Any]]) -> tuple[str, int] | None:
    """Which character a text loses at its start, and how often; None if tokens do not stand for themselves."""
    kinds = [part["type"] for part in parts]
    if kinds in (["ByteLevel"], ["Metaspace"], ["WordPiece"]):
        return "", 0
    before, strips = parts, ("", 0)
    if kinds[-1] == "Strip" and "Fuse" in kinds[:-1]:
        last = parts[-1]
        if last["stop"] or last["content"] == _ANCHOR:
            return None
        before, strips = parts[:-1], (last["content"], last["start"])
    kinds = [part["type"] for part in before]
    if kinds[-1] == "Fuse":
        kinds.pop()
    elif strips != ("", 0):
        return None
    if kinds and kinds[-1] == "ByteFallback":
        kinds.pop()
    patterns = [part["pattern"].get("String") for part in before if part["type"] == "Replace"]
    plain = all(pattern and _ANCHOR not in pattern for pattern in patterns)
    return strips if plain and set(kinds) <= {"Replace"} else None


class ByToken:
    """A text whose tokens each stand for bytes of their own."""

    __slots__ = ("_errors", "_first", "_odd", "_pending", "_strips", "_texts", "_whole")

    def __init__(self, texts: TokenTexts, *, goes_on: bool = False) -> None:
        assert texts.strip is not None
        self._texts = texts
        self._whole = texts.whole
        self._errors = texts.errors
        self._strips = 0 if goes_on else texts.strip[1]
        self._first = not goes_on
        self._pending = b""  # the beginning of a character: at most three bytes
        self._odd = not goes_on  # at the start, and while something is pending

    def push(self, token_id: int) -> str:
        if not self._odd:
            text = self._whole.get(token_id)
            if text is not None:
                return text
        return self._push_bytes(token_id)

    def _push_bytes(self, token_id: int) -> str:
        data = self._texts.text_bytes(token_id)
        if self._first and data:  # what is not shown is no first token
            self._first = False
            data = self._texts.first_bytes(token_id)
        return self._decode(data)

    @property
    def incomplete(self) -> str:
        return codecs.utf_8_decode(self._pending, self._errors, True)[0]

    def mark(self, text: str) -> str:
        self._first = False
        return self._decode(text.encode())

    def flush(self) -> str:
        text, self._pending = self.incomplete, b""
        return text

    def _decode(self, data: bytes) -> str:
        data = self._pending + data
        text, used = codecs.utf_8_decode(data, self._errors, False)
        self._pending = data[used:]
        if self._strips and text:
            text = self._stripped(text)
        self._odd = bool(self._first or self._pending or self._strips)
        return text

    def _stripped(self, text: str) -> str:
        """Only blanks at the very start: the first other character ends it."""
        assert self._texts.strip is not None
        content, start = self._texts.strip[0], 0
        while self._strips and text[start : start + 1] == content:
            start += 1
            self._strips -= 1
        if start < len(text):
            self._strips = 0
        return text[start:]


class Windowed:
    """A text whose tokens depend on their neighbours. `before` was shown; `pending` waits for a character's rest."""

    __slots__ = ("_backend", "_before", "_pending", "_texts")

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._backend = texts.backend
        self._before: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if not self._texts.is_shown(token_id):
            return ""
        self._pending.append(token_id)
        text = self._new_text()
        if len(self._pending) < _MAX_CHARACTER_BYTES and (not text or text.endswith(BROKEN)):
            return ""
        self._shown()
        return text

    @property
    def incomplete(self) -> str:
        return self._new_text() if self._pending else ""

    def mark(self, text: str) -> str:
        return self.flush() + text

    def flush(self) -> str:
        text = self.incomplete
        self._shown()
        return text

    def _shown(self) -> None:
        self._before = (self._before + self._pending)[-_WINDOW:]
        self._pending = []

    def _new_text(self) -> str:
        """Without what was shown; all of the new tokens' own text if they change what was."""
        shown, now = self._decoded(self._before), self._decoded(self._before + self._pending)
        return now[len(shown) :] if now.startswith(shown) else self._decoded(self._pending)

    def _decoded(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=True) if token_ids else ""


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
