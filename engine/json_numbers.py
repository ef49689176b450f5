"""Numbers in JSON come to an end, as runs of blanks do: a model may like the digits of 1/3 while there is room.

A grammar says what may follow, and for a number that is always another digit. So the characters of one are counted, in
the bytes of the tokens as they come; at the limit no token may continue it, unless the grammar allows nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from grammar.structured import MAX_NUMBER_CHARACTERS

_DIGITS = frozenset(b"0123456789")
_CONTINUES = frozenset(b"0123456789.eE+-")
_QUOTE, _BACKSLASH, _MINUS = b'"\\-'


class NumberLength:
    """Of the number that the text so far ends with. Strings may hold any digits."""

    __slots__ = ("_escaped", "_in_string", "_length")

    def __init__(self) -> None:
        self._in_string = False
        self._escaped = False
        self._length = 0

    def add(self, data: bytes) -> None:
        for c in data:
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif c == _BACKSLASH:
                    self._escaped = True
                elif c == _QUOTE:
                    self._in_string = False
            elif c in _DIGITS or c == _MINUS or (self._length and c in _CONTINUES):
                self._length += 1
            else:
                self._length = 0
                self._in_string = c == _QUOTE

    @property
    def at_limit(self) -> bool:
        return self._length >= MAX_NUMBER_CHARACTERS


def continuing(bytes_of: Callable[[int], bytes], vocab_size: int) -> np.ndarray:
    """uint32 words of 32 tokens, lowest bit first: those that go on with a number."""
    bits = np.fromiter((bytes_of(t)[:1] in _FIRST for t in range(vocab_size)), dtype=bool, count=vocab_size)
    padded = np.zeros(-(-vocab_size // 32) * 32, dtype=bool)
    padded[:vocab_size] = bits
    return np.packbits(padded, bitorder="little").view(np.uint32)


_FIRST = frozenset(bytes([c]) for c in _CONTINUES)
