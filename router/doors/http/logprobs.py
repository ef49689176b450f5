"""Log probabilities in the two shapes that OpenAI has for them, and what a token is called in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


class TokenNames:
    """A token's text and its own bytes, which may be a part of a character."""

    def __init__(self, backend: Any) -> None:
        """`backend`: a tokenizers.Tokenizer."""
        self._backend = backend
        decoders = json.dumps(json.loads(backend.to_str()).get("decoder") or {})
        self._byte_level = '"ByteLevel"' in decoders
        self._byte_fallback = '"ByteFallback"' in decoders
        self._special = {i for i, t in backend.get_added_tokens_decoder().items()}
        self._cache: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        known = self._cache.get(token_id)
        if known is None:
            known = self._cache[token_id] = self._bytes_of(token_id)  # at most one entry for each of the vocabulary
        return known

    def _bytes_of(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""  # of a model whose vocabulary is padded
        if token_id in self._special:
            return token.encode()
        if self._byte_level:
            return bytes(_BYTE_OF[c] for c in token) if all(c in _BYTE_OF for c in token) else token.encode()
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


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


def completion_logprobs(entries: Sequence[Entry], names: TokenNames, offset: int) -> tuple[dict[str, Any], int]:
    """And the offset after them. Where two tokens have the same text, the likelier one stands."""
    tokens, offsets, top = [], [], []
    for e in entries:
        text = names.bytes_of(e.token_id).decode(errors="replace")
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        best: dict[str, float] = {}
        for t in e.logprobs.top:
            best.setdefault(names.bytes_of(t.token_id).decode(errors="replace"), finite(t.logprob))
        best.setdefault(text, finite(e.logprobs.logprob))
        top.append(best)
    return {
        "tokens": tokens,
        "token_logprobs": [finite(e.logprobs.logprob) for e in entries],
        "top_logprobs": top,
        "text_offset": offsets,
    }, offset


def finite(logprob: float) -> float:
    """JSON has no -inf; OpenAI's word for "as good as impossible" is -9999."""
    return max(logprob, -9999.0)
