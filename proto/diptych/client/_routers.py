"""Several routers as one: which of them gets the next call.

The one with the fewest live calls of ours, in turn where they are equal. A router that was not there, or is leaving, is
passed over for a while as long as another one may answer. Any of them may go on with an answer that another one began.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

from diptych.client._answering import Trouble

_PASSED_OVER_S = 2.0
_SCHEMES = ("ipv4:", "ipv6:")  # gRPC's own lists of addresses have commas, too


def addresses_of(target: str | Sequence[str]) -> tuple[str, ...]:
    """ "a:8100,b:8100", or a list of such. Raises ValueError."""
    given = [target] if isinstance(target, str) else list(target)
    found = [one.strip() for text in given for one in ([text] if text.startswith(_SCHEMES) else text.split(","))]
    if not found or not all(found):
        raise ValueError(f"target is {target!r}; name one router or several, for example 'a:8100,b:8100'")
    return tuple(dict.fromkeys(found))


class Routers:
    """From any thread. `take` and `give_back` belong together."""

    def __init__(self, count: int, rng: random.Random) -> None:
        self._live = [0] * count
        self._passed_over_until = [float("-inf")] * count
        self._next = rng.randrange(count)  # clients that start together do not all begin with the first
        self._lock = threading.Lock()

    def take(self, now: float) -> int:
        with self._lock:
            count = len(self._live)
            in_turn = [(self._next + i) % count for i in range(count)]
            number = min(in_turn, key=lambda n: (self._passed_over_until[n] > now, self._live[n]))
            self._live[number] += 1
            self._next = (number + 1) % count
            return number

    def give_back(self, number: int, trouble: Trouble | None, now: float) -> bool:
        """After a call. True: another router may do at once what this one could not."""
        with self._lock:
            self._live[number] -= 1
            gone = trouble is not None and not trouble.by_server and trouble.code == "INTERNAL"  # in gRPC's words
            if not gone and (trouble is None or trouble.code != "UNAVAILABLE"):
                return False
            self._passed_over_until[number] = now + _PASSED_OVER_S
            return any(until <= now for until in self._passed_over_until)
