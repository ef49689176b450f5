"""When a number of an answer is long, in the bytes of tokens as they come."""

from __future__ import annotations

import numpy as np
import pytest

from engine.json_numbers import NumberLength, continuing
from grammar.structured import MAX_NUMBER_CHARACTERS


@pytest.mark.parametrize(
    ("text", "long"),
    [
        ('{"a": 0.' + "3" * 38, True),
        ('{"a": 0.' + "3" * 37, False),
        ("-" + "1" * 39, True),
        ("1e+" + "9" * 37, True),
        ('{"a": "' + "3" * 100, False),
        ('{"a": "\\"' + "3" * 100, False),
        ('{"a": "\\\\", "b": ' + "3" * 40, True),
        ("[" + "1," * 100, False),
        ("[true" + "e" * 100, False),
        ("3" * 100 + " ", False),
    ],
)
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_a_number_is_long(text: str, long: bool, piece: int) -> None:
    assert MAX_NUMBER_CHARACTERS == 40
    length, data = NumberLength(), text.encode()
    for at in range(0, len(data), piece):
        length.add(data[at : at + piece])
    assert length.at_limit is long


def test_the_tokens_that_go_on_with_a_number() -> None:
    tokens = [b"1", b"12,", b".5", b"", b",", b"e7", b"}", b"-", b" 3"] + [b"x"] * 40
    words = continuing(tokens.__getitem__, len(tokens))
    assert words.dtype == np.uint32
    assert [i for i in range(64) if words[i // 32] >> np.uint32(i % 32) & 1] == [0, 1, 2, 5, 7]
