"""The end of a pod under KubeRay. What Kubernetes signals there is Ray, which waits for nothing of ours; so the pod's
preStop hook, `diptych leave`, asks our replicas first, through files in a directory of the pod:

    1. replica-PID   "serves", written by a replica as soon as it serves
    2. leave         written by the hook; for a router after a hold, in which Kubernetes stops sending it anything
    3. replica-PID   "drained" or "not drained", when the replica has nothing left, or no time
    4. the hook ends once every replica that lives has said so, and Kubernetes sends its signal

No network, no key and no certificate is needed. $DIPTYCH_POD_DIR names the directory; without it nothing is watched.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

DIRECTORY = "DIPTYCH_POD_DIR"
_LEAVE = "leave"
_LOOK_S = 0.2
_SERVES, _DRAINED, _NOT_DRAINED = "serves", "drained", "not drained"


class PodWatch:
    """A replica's side. `drain` is called once, on a thread of its own, and says whether nothing was left."""

    def __init__(self, directory: Path, drain: Callable[[], bool]) -> None:
        self._directory = directory
        self._mine = directory / f"replica-{os.getpid()}"
        self._drain = drain
        self._stop = threading.Event()
        _write(self._mine, _SERVES)
        self._thread = threading.Thread(target=self._run, name="pod-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not (self._directory / _LEAVE).exists():
            if self._stop.wait(_LOOK_S):
                return
        log.info("this pod leaves: draining")
        try:
            drained = self._drain()
        except Exception:
            log.exception("draining failed")
            drained = False
        log.info("leaving: %s", "drained" if drained else "not everything is done; the rest is cut off")
        _write(self._mine, _DRAINED if drained else _NOT_DRAINED)

    def close(self) -> None:
        """The replica has left by itself: nobody waits for it any more."""
        self._stop.set()
        self._mine.unlink(missing_ok=True)


def watch(drain: Callable[[], bool]) -> PodWatch | None:
    """None: this is no pod."""
    directory = os.environ.get(DIRECTORY)
    return PodWatch(Path(directory), drain) if directory else None


@dataclass(frozen=True, slots=True)
class Left:
    drained: tuple[int, ...]  # process ids
    not_drained: tuple[int, ...]
    still_there: tuple[int, ...]  # when time was up

    @property
    def clean(self) -> bool:
        return not self.not_drained and not self.still_there


def leave(directory: Path, hold_s: float, timeout_s: float) -> Left:
    """The hook's side: returns when everything has drained, or after `hold_s + timeout_s`."""
    if hold_s and _replicas(directory):
        time.sleep(hold_s)
    _write(directory / _LEAVE, "")
    deadline = time.monotonic() + timeout_s
    while True:
        said = _replicas(directory)
        waiting = tuple(pid for pid, word in said.items() if word == _SERVES)
        if not waiting or time.monotonic() > deadline:
            return Left(
                tuple(pid for pid, word in said.items() if word == _DRAINED),
                tuple(pid for pid, word in said.items() if word == _NOT_DRAINED),
                waiting,
            )
        time.sleep(_LOOK_S)


def _replicas(directory: Path) -> dict[int, str]:
    """What those that live have said."""
    said = {}
    for path in sorted(directory.glob("replica-*")):
        pid = int(path.name.removeprefix("replica-"))
        if Path(f"/proc/{pid}").exists():
            said[pid] = path.read_text()
    return said


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)
