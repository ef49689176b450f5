"""Grammars in the engine: compiled once, followed by each sequence with a matcher of its own.

    GrammarCompiler.compile   on a thread: a format and the model's tokenizer become a Grammar
    Grammar.start             a sequence's matcher, at the beginning of the answer (a copy: microseconds)
    fill_masks                before a draw: which tokens may come, one bit each, all sequences in one call
    Matcher.advance           with each token that the sequence takes, sampled here or elsewhere

A matcher that cannot go on (its grammar has no way out, or costs more than `limits` allow) stays in error: `advance`
returns False from then on, and the sequence ends with an explicit error. llguidance is imported only when a grammar is.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from checkpoint.files import CheckpointError
from checkpoint.generation import read_description
from checkpoint.tokenizer import load_tokenizer
from engine.json_numbers import NumberLength, continuing
from grammar.structured import Structured, StructuredError, check_size, first_words, limits, llguidance_grammar
from settings.model_path import ModelPathError, resolve_model

_COMPLETE = ("NoExtension", "EndOfSentence")


class Matcher:
    """One sequence's place in its grammar. `end_tokens`: the model's end-of-sequence tokens, which may end the answer
    wherever it is complete. Nothing here raises: what the library does not survive ends one sequence.
    """

    __slots__ = ("_numbers", "_panic", "_tokenizer", "end_tokens", "inner")

    def __init__(self, inner: Any, end_tokens: tuple[int, ...], json_tokenizer: Any = None) -> None:
        """`json_tokenizer`: an LLTokenizer, where the answer is JSON, whose numbers are to end."""
        self.inner = inner
        self._tokenizer = json_tokenizer
        self._numbers = NumberLength() if json_tokenizer is not None else None
        self.end_tokens = end_tokens
        self._panic = ""

    def advance(self, tokens: Sequence[int]) -> bool:
        """False: they do not follow, or no token can; `error` says why."""
        if self._panic:
            return False
        try:
            if self._numbers is not None:
                self._numbers.add(self._tokenizer.decode_bytes(list(tokens)))
            return self.inner.consume_tokens(list(tokens))
        except BaseException as panic:
            self._broke(panic)
            return False

    def copy(self) -> Matcher:
        """At the same place; goes its own way from here."""
        other = Matcher(self.inner.deep_copy(), self.end_tokens)
        other._tokenizer, other._numbers, other._panic = self._tokenizer, copy.copy(self._numbers), self._panic
        return other

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of them may come, one after the other; the matcher stays where it is."""
        if self._panic:
            return 0
        try:
            return self.inner.validate_tokens(list(tokens))
        except BaseException as panic:
            self._broke(panic)
            return 0

    @property
    def number_is_long(self) -> bool:
        return self._numbers is not None and self._numbers.at_limit

    @property
    def complete(self) -> bool:
        """The answer is whole and nothing can follow."""
        if self._panic:
            return False
        try:
            return self.inner.is_stopped() and self.inner.stop_reason() in _COMPLETE
        except BaseException as panic:
            self._broke(panic)
            return False

    def tokens_of_numbers(self, words: int) -> np.ndarray:
        """uint32 [words]: tokens that go on with a number."""
        tokenizer = self._tokenizer
        found = np.zeros(words, dtype=np.uint32)
        known = continuing(lambda t: tokenizer.decode_bytes([t]), min(tokenizer.vocab_size, words * 32))
        found[: len(known)] = known
        return found

    @property
    def broken(self) -> bool:
        """The library failed, which is nobody's fault but ours."""
        return bool(self._panic)

    @property
    def error(self) -> str:
        return self._panic or first_words(self.inner.get_error())

    def _broke(self, panic: BaseException) -> None:
        """Rust's panics are of no public type, and no Exceptions."""
        if isinstance(panic, KeyboardInterrupt | SystemExit):
            raise panic
        self._panic = f"the grammar library failed: {first_words(str(panic))}"


class Grammar:
    """Compiled; shared by all sequences of one format."""

    def __init__(self, inner: Any, end_tokens: tuple[int, ...], json_tokenizer: Any) -> None:
        self._inner = inner
        self._end_tokens = end_tokens
        self._json_tokenizer = json_tokenizer

    def start(self) -> Matcher:
        return Matcher(self._inner.deep_copy(), self._end_tokens, self._json_tokenizer)


class GrammarCompiler:
    """For one model. Any thread; those of grammar.threads, for the depth of the library's recursion."""

    def __init__(self, model: str, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def prepare(self) -> None:
        """Loads the tokenizer, which takes up to a second: before the first request that needs it. Raises
        StructuredError.
        """
        with self._lock:
            if self._tokenizer is not None:
                return
            from llguidance import LLTokenizer

            try:
                path = resolve_model(self._model)
                loaded = load_tokenizer(path)
                own = loaded.eos_token_id
                ends = sorted(read_description(path).end_tokens | ({own} if own is not None else set()))
                self._tokenizer = LLTokenizer(loaded.backend.to_str(), n_vocab=self._vocab_size, eos_token=ends or None)
            except (ModelPathError, CheckpointError, ValueError) as error:
                raise StructuredError(f"this worker has no tokenizer for {self._model} ({error})") from error

    def compile(self, structured: Structured) -> Grammar:
        """Raises StructuredError, with the cause. The first mask is made here too: the first is the slow one."""
        from llguidance import LLMatcher

        check_size(structured)
        self.prepare()
        try:
            inner = LLMatcher(self._tokenizer, llguidance_grammar(structured), log_level=0, limits=limits())
            if not inner.is_error():
                inner.deep_copy().compute_bitmask()
        except BaseException as panic:  # how Rust's panics arrive here; they are of no public type
            if isinstance(panic, KeyboardInterrupt | SystemExit | StructuredError):
                raise
            raise StructuredError(f"the grammar library failed: {first_words(str(panic))}") from None
        if inner.is_error():
            raise StructuredError(first_words(inner.get_error()))
        json_tokenizer = self._tokenizer if structured.writes_json else None
        return Grammar(inner, tuple(self._tokenizer.eos_tokens), json_tokenizer)


class Masks:
    """Fills masks, many at once on threads of its own."""

    def __init__(self, vocabulary: int) -> None:
        self._words = -(-vocabulary // 32)
        self._executor: Any = None
        self._continuing: np.ndarray | None = None  # one model, one vocabulary

    def fill(self, matchers: Sequence[Matcher]) -> np.ndarray:
        """uint32 [matchers, words of 32 tokens], lowest bit first: the tokens that may come. Never a row of none."""
        masks = np.zeros((len(matchers), self._words), dtype=np.uint32)
        self._fill(matchers, masks)
        for mask, matcher in zip(masks, matchers, strict=True):
            if matcher.number_is_long:
                self._end_number(mask, matcher)
        return masks

    def _end_number(self, mask: np.ndarray, matcher: Matcher) -> None:
        if self._continuing is None:
            self._continuing = matcher.tokens_of_numbers(len(mask))
        ended = mask & ~self._continuing
        if ended.any():
            mask[:] = ended

    def _fill(self, matchers: Sequence[Matcher], masks: np.ndarray) -> None:
        if len(matchers) == 1:
            matchers[0].inner.unsafe_compute_mask_ptr(masks.ctypes.data, masks.nbytes)
            return
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        self._executor.unsafe_compute_mask_ptr(
            [(matcher.inner, i) for i, matcher in enumerate(matchers)], masks.ctypes.data, self._words * 4, len(masks)
        )


def hold_back(mask: np.ndarray, tokens: Sequence[int]) -> None:
    """Forbids `tokens` in one row [words], unless nothing else is left."""
    ids = np.asarray([t for t in tokens if 0 <= t < len(mask) * 32], dtype=np.int64)
    kept = mask.copy()
    np.bitwise_and.at(kept, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))
    if kept.any():
        mask[:] = kept
