"""Log probabilities in the two shapes that OpenAI has for them, and what a token is called in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from router.text.detokenizer import Detokenizer, TokenTexts


class TokenNames:
    """A token's text and its own bytes, which may be a part of a character."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._cache: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        known = self._cache.get(token_id)
        if known is None:
            known = self._cache[token_id] = self._texts.bytes_of(token_id)  # one entry for each of the vocabulary
        return known

    def offsets(self, *, skip_special: bool = True) -> Offsets:
        return Offsets(self._texts.stream(), {} if skip_special else self._texts.special_names)


class Offsets:
    """Where in an answer's text each of its tokens begins; for one in the middle of a character, that character."""

    def __init__(self, characters: Detokenizer, shown: Mapping[int, str]) -> None:
        """`shown`: special tokens that are part of the text."""
        self._characters = characters
        self._shown = shown
        self._offset = 0

    def next(self, token_id: int) -> int:
        before, incomplete = self._offset, self._characters.incomplete
        text = self._characters.push(token_id)
        if not text and token_id in self._shown:
            text = self._characters.mark(self._shown[token_id])
        self._offset += len(text)
        # A character that this token does not complete is broken, and ends before it.
        return before + (len(incomplete) if incomplete and text.startswith(incomplete) else 0)


class Entry:
    """One token of an answer. `logprobs` as TokenLogprobs in generate.proto."""

    __slots__ = ("logprobs", "token_id")

    def __init__(self, token_id: int, logprobs: Any) -> None:
        self.token_id = token_id
        self.logprobs = logprobs


def chat_logprobs(entries: Sequence[Entry], names: TokenNames) -> dict[str, Any]:
    def one(token_id: int, logprob: float) -> dict[str, Any]:
        data = names.bytes_of(token_id)
        return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}

    return {
        "content": [
            {
                **one(e.token_id, e.logprobs.logprob),
                "top_logprobs": [one(top.token_id, top.logprob) for top in e.logprobs.top],
            }
            for e in entries
        ],
        "refusal": None,
    }


def completion_logprobs(entries: Sequence[Entry], names: TokenNames, text: Offsets) -> dict[str, Any]:
    """`text`: of this answer so far. Where two tokens have the same text, the likelier one stands."""
    tokens, offsets, top = [], [], []
    for e in entries:
        name = names.bytes_of(e.token_id).decode(errors="replace")
        tokens.append(name)
        offsets.append(text.next(e.token_id))
        best: dict[str, float] = {}
        for t in e.logprobs.top:
            best.setdefault(names.bytes_of(t.token_id).decode(errors="replace"), finite(t.logprob))
        best.setdefault(name, finite(e.logprobs.logprob))
        top.append(best)
    return {
        "tokens": tokens,
        "token_logprobs": [finite(e.logprobs.logprob) for e in entries],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def finite(logprob: float) -> float:
    """JSON has no -inf; OpenAI's word for "as good as impossible" is -9999."""
    return max(logprob, -9999.0)
