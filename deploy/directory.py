"""Where the routers are, when Ray places them: a named actor that routers tell and workers ask. What was decided about
the pools' sizes lies here too, so that every router has it, also one that starts later.

Off the request path. A worker that cannot reach it keeps the addresses it knew last.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray

log = logging.getLogger(__name__)

_NAME = "diptych-directory"
_NAMESPACE = "diptych"
_TTL_S = 10.0
_EVERY_S = 1.0
_TELL_S = 5.0
_MAX_REFUSALS, _MAX_PHASES, _MAX_WORDS = 16, 1024, 4000
_MAX_DECISIONS, _MAX_DECISION_BYTES = 256, 32 << 10
_MAX_KEPT = 16


@ray.remote(num_cpus=0, max_restarts=-1)
class _Directory:
    def __init__(self) -> None:
        self._seen: dict[str, float] = {}
        self._shown: dict[str, str] = {}  # where clients find a router, by where workers do
        self._refusals: dict[str, str] = {}
        self._phases: dict[str, str] = {}
        self._decisions: deque[tuple[int, float, bytes]] = deque(maxlen=_MAX_DECISIONS)  # (number, time, message)
        self._decided = time.time_ns()  # the numbers of an actor that was restarted go on above
        self._kept: dict[str, str] = {}

    def tell(self, address: str, public: str) -> None:
        self._seen[address] = time.monotonic()
        self._shown[address] = public

    def leave(self, address: str) -> None:
        self._seen.pop(address, None)
        self._shown.pop(address, None)

    def refuse(self, who: str, why: str) -> None:
        if len(self._refusals) < _MAX_REFUSALS:
            self._refusals.setdefault(who, why[:_MAX_WORDS])

    def refusals(self) -> dict[str, str]:
        return self._refusals

    def phase(self, who: str, what: str) -> None:
        if who in self._phases or len(self._phases) < _MAX_PHASES:
            self._phases[who] = what[:_MAX_WORDS]

    def phases(self) -> dict[str, str]:
        return self._phases

    def forget_refusals(self) -> None:
        self._refusals.clear()
        self._phases.clear()

    def decided(self, message: bytes) -> None:
        if len(message) <= _MAX_DECISION_BYTES:
            self._decided += 1
            self._decisions.append((self._decided, time.monotonic(), message))

    def decisions(self, after: int) -> list[tuple[int, float, bytes]]:
        """(number, how long it has lain here, message), oldest first."""
        now = time.monotonic()
        return [(number, now - at, message) for number, at, message in self._decisions if number > after]

    def keep(self, name: str, value: str) -> None:
        if name in self._kept or len(self._kept) < _MAX_KEPT:
            self._kept[name] = value

    def kept(self, name: str) -> str:
        return self._kept.get(name, "")

    def addresses(self) -> list[str]:
        now = time.monotonic()
        self._seen = {a: t for a, t in self._seen.items() if now - t < _TTL_S}
        return sorted(self._seen)

    def public_addresses(self) -> list[str]:
        return [self._shown[address] for address in self.addresses()]


def tell_refusal(who: str, why: str) -> None:
    """A replica's last words, for whoever waits for the cluster: Serve's own report keeps them to itself."""
    try:
        ray.get(_actor().refuse.remote(who, why), timeout=_TELL_S)
    except Exception as error:  # what it had to say is in its log too
        log.warning("the directory could not be informed: %s", error)


def tell_phase(who: str, what: str) -> None:
    """What a replica that starts is doing; nobody is waited for."""
    _actor().phase.remote(who, what)


def tell_scaling(message: bytes) -> None:
    """A ScalingDecision, serialized, for all routers; nobody is waited for. Each has it a second later."""
    _actor().decided.remote(message)


def public_addresses() -> list[str]:
    """Of the routers, for clients. Raises what Ray raises."""
    return ray.get(_actor().public_addresses.remote(), timeout=_TELL_S)


def internal_addresses() -> list[str]:
    """Of the routers, for members of the cluster. Raises what Ray raises."""
    return ray.get(_actor().addresses.remote(), timeout=_TELL_S)


def keep(name: str, value: str) -> None:
    """For whoever comes later, as long as the directory lives. Raises what Ray raises."""
    ray.get(_actor().keep.remote(name, value), timeout=_TELL_S)


def kept(name: str) -> str:
    """Empty: nothing. Raises what Ray raises."""
    return ray.get(_actor().kept.remote(name), timeout=_TELL_S)


def somebody_is_there() -> bool:
    """A router, lately."""
    with contextlib.suppress(Exception):
        return bool(public_addresses())
    return False


def read_phases() -> dict[str, str]:
    """Raises what Ray raises."""
    return ray.get(_actor().phases.remote(), timeout=_TELL_S)


def read_refusals() -> dict[str, str]:
    """Who could not start, and why. Raises what Ray raises."""
    return ray.get(_actor().refusals.remote(), timeout=_TELL_S)


def forget_refusals() -> None:
    ray.get(_actor().forget_refusals.remote(), timeout=_TELL_S)


def _actor() -> Any:
    return _Directory.options(name=_NAME, namespace=_NAMESPACE, lifetime="detached", get_if_exists=True).remote()


class _Beat:
    """Calls `once` every second on a thread of its own until stopped."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="directory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.once()
            except Exception as error:  # Ray may be restarting; the last known state stands
                log.debug("directory: %s", error)
            self._stop.wait(_EVERY_S)

    def once(self) -> None:
        raise NotImplementedError


class RouterPresence(_Beat):
    """A router tells the directory where workers register, and clients call; and hears what was decided about scaling:
    `on_scaling` is called with a message and how long it has lain here, on this thread.
    """

    def __init__(self, address: str, public: str, on_scaling: Callable[[bytes, float], object]) -> None:
        self._address = address
        self._public = public
        self._on_scaling = on_scaling
        self._heard = 0
        super().__init__()

    def once(self) -> None:
        actor = _actor()
        ray.get(actor.tell.remote(self._address, self._public), timeout=5.0)
        found = ray.get(actor.decisions.remote(self._heard), timeout=5.0)
        for number, late_s, message in found:
            self._heard = number
            self._on_scaling(message, late_s)

    def leave(self) -> None:
        """At the very end: while a router drains, its workers go on telling it that they are there."""
        self.stop()
        with contextlib.suppress(Exception):  # it is forgotten after a while
            ray.get(_actor().leave.remote(self._address), timeout=_TELL_S)


class RouterLookup(_Beat):
    """A worker's view of the routers: `addresses()` returns at once, with what was known last."""

    def __init__(self) -> None:
        self._known: list[str] = []
        super().__init__()

    def addresses(self) -> list[str]:
        return self._known

    def once(self) -> None:
        found = ray.get(_actor().addresses.remote(), timeout=5.0)
        if found:
            self._known = found
