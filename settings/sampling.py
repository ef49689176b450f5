"""What the numbers that shape a draw may be: within these bounds float32 arithmetic on logits stays finite.

The router refuses the rest by name, at every door; the worker looks again, as it trusts no router. Both compare what
the wire carries, float32: 0.01 is within [0.01, 100] however it came.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 1 << 17  # of a prompt: tokens x (1 + alternatives)
MAX_LOGIT_BIAS = 100.0
MAX_ALLOWED_TOKEN_IDS = 4096
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 64
MAX_BANNED = 2 * MAX_BAD_WORDS  # sequences of tokens: each word with a blank before it and without
MAX_BEAMS = 16
# Nearer to 0 a temperature is none: the best token has all the chance there is, but for exact ties.
GREEDY_BELOW = 1e-5
LEAST_TOP_P = 1e-6  # any smaller share is the best token's alone, too, and might be 0 in float32


@dataclass(frozen=True, slots=True)
class Range:
    """`low` itself is outside where it is `open`. `note`: a word on a value, for an error."""

    low: float
    high: float
    open: bool = False
    note: str = ""
    whole: bool = False  # and compared as it is

    def __contains__(self, value: float) -> bool:
        if self.whole:
            return self.low <= value <= self.high
        number = as_float32(value)
        low, high = as_float32(self.low), as_float32(self.high)
        return low <= number <= high and not (self.open and value <= self.low)

    def __str__(self) -> str:
        if self.whole:
            return f"a whole number in [{self.low}, {self.high}]{self.note}"
        return f"a number in {'(' if self.open else '['}{self.low:g}, {self.high:g}]{self.note}"


RANGES = {
    "temperature": Range(0, 100, note=", where 0 is greedy"),
    "top_p": Range(0, 1, open=True),
    "top_k": Range(0, (1 << 31) - 1, note=", where 0 is off", whole=True),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0.01, 100, note=", where 1 is off"),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
}

LENGTH_PENALTY = Range(-5, 5)  # of answers, within which their scores stay finite


def as_float32(value: float) -> float:
    """What the wire makes of it; not a number where it does not fit."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except (OverflowError, struct.error):
        return math.nan


def resolved(name: str, value: float) -> float:
    """A number within its range, as the draw uses it."""
    if name == "temperature" and value < GREEDY_BELOW:
        return 0.0
    if name == "top_p":
        return max(value, LEAST_TOP_P)
    return value
