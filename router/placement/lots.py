"""How much a prompt's work counts when not all can be in time, and somebody is put back (engine/overload.py).

    weight = lot ^ (protect / (1 - protect))      who has most work x weight goes: work ^ (1 - protect) x lot ^ protect

`lot` is drawn for each request, evenly from 0 to 1. With `router.overload_protect` at 0 all weights are 1, and the
longest prompts go. At 1/2 a prompt of twice the work goes as often as one of twice the lot. At 1 the lot decides alone.
A lot is a hash of the request's id, so that nobody keeps it, and of a secret of the router, so that no client picks an
id that is never put back.
"""

from __future__ import annotations

import hashlib

_LEAST = 2.0**-10  # with the largest exponent, the least weight is still above 0
_LARGEST_EXPONENT = 99.0


def lot_of(request_id: str, secret: str) -> float:
    """Above 0, to 1."""
    drawn = int.from_bytes(hashlib.blake2b(f"{secret}/{request_id}".encode(), digest_size=4).digest())
    return max(_LEAST, (drawn + 1) / 2**32)


def weight_of(lot: float, protect: float) -> float:
    """Above 0, to 1."""
    return lot ** min(_LARGEST_EXPONENT, protect / max(1e-9, 1.0 - protect))
