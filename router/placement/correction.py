"""What estimates turn out to be worth: actual against predicted milliseconds, learned online. Pure.

    corrected = fixed_ms + factor * predicted

Fixed costs and factors need not be told apart by hand: the line is fitted by least squares over recent pairs, in
relative error, pulled towards "the estimate is right" as by some pairs that say so. Old pairs fade by number and by
age, so a worker that is mended is trusted again, and one of which nothing is heard for a while is taken at its word.
Both numbers are bounded: a run of bad luck must not move a worker out of sight for ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_FLOOR_MS = 10.0  # below it, errors count in milliseconds rather than relatively
_DOUBT = 4.0  # pairs that say that the estimate is right
_KEEP = 0.97  # of a pair's weight when another one comes
_HALF_LIFE_S = 120.0
_STANDS_S = 1.0
_MAX_FACTOR = 3.0
_MAX_FIXED_MS = 250.0
_USUAL_FIXED_MS = 120.0  # a fixed part of that size is doubted as a factor of 2 is
_MAX_PAIR = 8.0  # times off: beyond, something else happened (a fault, a stop), and it counts as so much


@dataclass(slots=True, unsafe_hash=True)
class Corrected:
    """Applied by the policy. The default changes nothing.

    Never changed once made (not `frozen`: making one would cost twice as much, and there are thousands a second).
    """

    fixed_ms: float = 0.0
    factor: float = 1.0

    def __call__(self, predicted_ms: float) -> float:
        return self.fixed_ms + self.factor * predicted_ms


UNCORRECTED = Corrected()


class Correction:
    """Learns one worker's line for one kind of estimate."""

    __slots__ = ("_at", "_n", "_value", "_valued_at", "_x", "_xx", "_xy", "_y")

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._at = 0.0
        self._value: Corrected | None = UNCORRECTED
        self._valued_at = math.inf

    def observe(self, predicted_ms: float, actual_ms: float, now: float) -> None:
        """`predicted_ms` as it was before correction."""
        if not (predicted_ms >= 0 and actual_ms >= 0):  # also not a number
            return
        low, high = (predicted_ms + _FLOOR_MS) / _MAX_PAIR, (predicted_ms + _FLOOR_MS) * _MAX_PAIR
        y = min(max(actual_ms, low - _FLOOR_MS), high)
        weight, keep = 1.0 / (predicted_ms + _FLOOR_MS) ** 2, _KEEP * self._fading(now)
        self._n = self._n * keep + weight
        self._x = self._x * keep + weight * predicted_ms
        self._y = self._y * keep + weight * y
        self._xx = self._xx * keep + weight * predicted_ms**2
        self._xy = self._xy * keep + weight * predicted_ms * y
        self._at = max(self._at, now)
        self._value = None

    def value(self, now: float) -> Corrected:
        """Asked for often, and worked out when there is something new to it, or it has faded for a second."""
        if self._value is None or now - self._valued_at > _STANDS_S:
            self._value, self._valued_at = self._fitted(now), now
        return self._value

    def _fitted(self, now: float) -> Corrected:
        """Minimizes sum w (y - fixed - factor x)^2 + _DOUBT ((fixed / _USUAL_FIXED_MS)^2 + (factor - 1)^2)."""
        fade = self._fading(now)
        n, x, y, xx, xy = self._n * fade, self._x * fade, self._y * fade, self._xx * fade, self._xy * fade
        if n == 0.0:
            return UNCORRECTED
        a11, a12, a22 = n + _DOUBT / _USUAL_FIXED_MS**2, x, xx + _DOUBT
        b1, b2 = y, xy + _DOUBT
        determinant = a11 * a22 - a12 * a12
        if determinant <= 0.0:
            return UNCORRECTED
        fixed = (b1 * a22 - b2 * a12) / determinant
        if fixed < 0.0 or fixed > _MAX_FIXED_MS:  # then the best factor for the bound
            fixed = min(max(fixed, 0.0), _MAX_FIXED_MS)
        factor = (b2 - fixed * a12) / a22
        return Corrected(fixed, min(max(factor, 1.0 / _MAX_FACTOR), _MAX_FACTOR))

    def _fading(self, now: float) -> float:
        """Of what was seen by `_at`, how much counts now."""
        return 0.5 ** ((now - self._at) / _HALF_LIFE_S) if now > self._at else 1.0
