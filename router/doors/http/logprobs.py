"""Log probabilities in the two shapes that OpenAI has for them, and what a token is called in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from router.prompt_logprobs import Scores
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

    def name_of(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode(errors="replace")

    def offsets(self, *, skip_special: bool = True, start: int = 0) -> Offsets:
        """`start`: characters that stand before the text."""
        return Offsets(self._texts.stream(), {} if skip_special else self._texts.special_names, start)


class Offsets:
    """Where in an answer's text each of its tokens begins; for one in the middle of a character, that character."""

    def __init__(self, characters: Detokenizer, shown: Mapping[int, str], start: int = 0) -> None:
        """`shown`: special tokens that are part of the text."""
        self._characters = characters
        self._shown = shown
        self._offset = start

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
        name = names.name_of(e.token_id)
        tokens.append(name)
        offsets.append(text.next(e.token_id))
        best: dict[str, float] = {}
        for t in e.logprobs.top:
            best.setdefault(names.name_of(t.token_id), finite(t.logprob))
        best.setdefault(name, finite(e.logprobs.logprob))
        top.append(best)
    return {
        "tokens": tokens,
        "token_logprobs": [finite(e.logprobs.logprob) for e in entries],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def prompt_logprobs(
    prompt: Sequence[int], scores: Scores, alternatives: int, names: TokenNames
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's: for each token of the prompt, the first one apart, itself and the likeliest, by their ids."""

    def one(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": names.name_of(token_id)}

    said: list[dict[str, dict[str, Any]] | None] = [None]
    for token_id, own, rank, ids, values in _rows(prompt, scores, alternatives):
        entry = {str(token_id): one(token_id, own, rank)}
        for place, (other, value) in enumerate(zip(ids, values, strict=True), 1):
            if other != token_id:
                entry[str(other)] = one(other, value, place)
        said.append(entry)
    return said


def echoed_logprobs(
    prompt: Sequence[int], scores: Scores, alternatives: int, names: TokenNames, answer: dict[str, Any], echo: str
) -> dict[str, Any]:
    """`answer`, as completion_logprobs has them, behind those of the prompt, whose text is `echo`."""
    text = names.offsets()
    tokens = np.asarray(prompt).tolist()
    top: list[dict[str, float] | None] = [None]
    own: list[float | None] = [None]
    for token_id, logprob, _, ids, values in _rows(prompt, scores, alternatives):
        own.append(finite(logprob))
        best: dict[str, float] = {}
        for other, value in zip(ids, values, strict=True):
            best.setdefault(names.name_of(other), finite(value))
        best.setdefault(names.name_of(token_id), finite(logprob))
        top.append(best)
    return {
        "tokens": [names.name_of(t) for t in tokens] + answer["tokens"],
        "token_logprobs": own + answer["token_logprobs"],
        "top_logprobs": top + answer["top_logprobs"],
        "text_offset": [min(text.next(t), len(echo)) for t in tokens] + answer["text_offset"],
    }


def _rows(prompt: Sequence[int], scores: Scores, alternatives: int) -> Iterator[tuple[int, float, int, Any, Any]]:
    own, ranks = scores.own.tolist(), scores.ranks.tolist()
    ids, values = scores.ids[:, :alternatives].tolist(), scores.values[:, :alternatives].tolist()
    return zip(np.asarray(prompt)[1:].tolist(), own, ranks, ids, values, strict=True)


def finite(logprob: float) -> float:
    """JSON has no -inf; OpenAI's word for "as good as impossible" is -9999."""
    return max(logprob, -9999.0)
