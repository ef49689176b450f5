from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from router.errors import RequestRefused
from router.text.bad_words import bad_word_tokens
from router.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import byte_level_bpe

BACKEND = byte_level_bpe()


def tokens_of(*words: str, vocab_size: int = 10_000) -> tuple[tuple[int, ...], ...]:
    return bad_word_tokens(words, cast(Tokenizer, SimpleNamespace(backend=BACKEND)), vocab_size)


def ids(text: str) -> tuple[int, ...]:
    found: Any = BACKEND.encode(text, add_special_tokens=False)
    return tuple(found.ids)


def test_a_word_is_banned_where_it_begins_a_text_and_behind_a_blank() -> None:
    assert tokens_of("cat") == (ids("cat"), ids(" cat"))
    assert tokens_of("  cat", "cat") == tokens_of("cat")
    assert tokens_of("the cat") == (ids("the cat"), ids(" the cat"))
    assert len(ids("the cat")) > 1


def test_what_the_model_has_no_token_for_needs_no_ban() -> None:
    assert tokens_of("cat", vocab_size=max(*ids("cat"), *ids(" cat"))) == ()


def test_a_word_of_many_tokens_is_refused() -> None:
    with pytest.raises(RequestRefused, match="65 tokens, the limit is 64"):
        tokens_of("q" * 65)
