"""`bad_words`: what an answer must not say, as sequences of tokens of which the last may not follow the others."""

from __future__ import annotations

from collections.abc import Sequence

from router.errors import Code, refuse
from router.text.encode import encode
from router.text.tokenizer import Tokenizer
from settings.sampling import MAX_BAD_WORD_TOKENS

MAX_BAD_WORDS_BYTES = 16 << 10  # together


def bad_word_tokens(words: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Each word as it begins a text, and as it stands behind a blank. Raises RequestRefused."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        for text in (bare, f" {bare}"):
            tokens = tuple(encode(tokenizer.backend, text, add_special_tokens=False))
            if len(tokens) > MAX_BAD_WORD_TOKENS:
                why = f"a bad word has {len(tokens)} tokens, the limit is {MAX_BAD_WORD_TOKENS}; send shorter ones"
                raise refuse(Code.INVALID_ARGUMENT, why, field="bad_words")
            if tokens and max(tokens) < vocab_size:  # what the model cannot say needs no ban
                found[tokens] = None
    return tuple(found)
