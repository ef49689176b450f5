"""Rank 0: starts the other ranks, tells them each step, and knows at once when one is gone.

1. `Leader(config)` starts the processes (engine/ranks/follower.py) and waits until all are there.
2. All ranks load their parts of the model, compare what they have, and try it together.
3. `Led` stands in for the model's forward pass: it tells the others what to compute, and computes along.
4. A thread watches the processes. One that ends, or fails where the others do not, ends the worker: `watch`.

The other ranks end with this process, whatever ends it: their sockets close, and the kernel kills them, stopped or not,
when the thread that started them is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.attention.interface import Chunk
from engine.config import EngineConfig
from engine.forward import Arriving, Forward
from engine.kv_shape import KvPool
from engine.model_errors import ModelLoadError, RankLost
from engine.ranks.group import Group, Stamps, meeting_at
from engine.ranks.link import FAILURE, Kind, receive, send
from engine.ranks.message import encode
from engine.ranks.place import Place
from settings.phases import FILE_VARIABLE
from settings.process import LAST_WORDS

log = logging.getLogger(__name__)

_HERE_S = 600.0  # a process that has only imported torch
_ALIKE_S = 5.0  # until the other ranks say that a step failed with them, too
_KNOWN_S = 2.0  # until it is known how a process ended
_END_S = 2.0


@dataclass(slots=True)
class _Rank:
    number: int
    link: socket.socket
    kv_link: socket.socket  # for whoever moves its KV
    process: subprocess.Popen[bytes] | None = None
    here: bool = False
    ready: bool = False
    refused: str = ""
    failed: dict[int, tuple[int, str]] = field(default_factory=dict[int, tuple[int, str]])  # step -> calls, cause
    ended: str = ""

    def __str__(self) -> str:
        return f"rank {self.number} (process {self.process.pid if self.process is not None else '?'})"


def start_process(_: int, descriptors: list[int]) -> subprocess.Popen[bytes]:
    """`descriptors` are inherited."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for ours in (FILE_VARIABLE, LAST_WORDS):  # files in which the worker says how it is
        environment.pop(ours, None)
    return subprocess.Popen(
        [sys.executable, "-m", "engine.ranks.follower", *map(str, descriptors), str(os.getpid())],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        env=environment,
    )


class Leader:
    """Raises ModelLoadError where the ranks cannot be started."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self.place = Place(0, config.tensor_parallel, config.expert_parallel)
        self._on_lost: Callable[[RankLost], None] | None = None
        self._why: RankLost | None = None
        self._config = config
        self._changed = threading.Condition()
        self._closing = False
        self._step = 0
        self._in_step = False
        self._stamps_fd = os.memfd_create("diptych-ranks", os.MFD_CLOEXEC)
        self._stamps = Stamps(self._stamps_fd, self.place.degree)
        # Never closed: gloo keeps a store that opens it by this number (engine/ranks/group.py).
        self._meeting_fd = os.memfd_create("diptych-meeting", os.MFD_CLOEXEC)
        self._ranks: list[_Rank] = []
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()
        try:
            self._wait(lambda rank: rank.here, _HERE_S, "has not come up")
            self.group = Group(self.place, meeting_at(self._meeting_fd), self._stamps, device)
            self.group.least([0])  # all are connected
        except RankLost as lost:
            self.close()
            raise ModelLoadError(str(lost)) from lost
        except BaseException:
            self.close()
            raise

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        return self.group.sum(part)

    def join(self, part: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return self.group.join(part, sizes)

    def watch(self, on_lost: Callable[[RankLost], None]) -> None:
        """`on_lost` hears of it, on a thread of its own, when the worker cannot go on."""
        with self._changed:
            self._on_lost = on_lost
            lost = self._why
        if lost is not None:
            on_lost(lost)

    def wait_until_ready(self) -> None:
        """All ranks have loaded. Raises RankLost."""
        self._wait(lambda rank: rank.ready, _HERE_S, "has not finished loading")

    def tell(self, message: bytes) -> None:
        self._step += 1
        self._in_step = True
        self.group.begin(self._step)
        for rank in self._ranks:
            try:
                send(rank.link, Kind.STEP, message)
            except OSError:
                raise self._lost(f"{rank} takes no steps any more") from None

    def told(self) -> None:
        """The step is computed."""
        self._in_step = False

    def settle(self, error: BaseException) -> None:
        """A step failed here. Returns if it did so alike on all ranks: then others may follow. Raises RankLost."""
        step, calls = self._step, self.group.calls
        self._in_step = False
        if isinstance(error, RankLost):
            raise self._lost(str(error)) from error
        deadline = time.monotonic() + _ALIKE_S
        with self._changed:
            for rank in self._ranks:
                while step not in rank.failed and not rank.ended and time.monotonic() < deadline:
                    self._changed.wait(max(0.0, deadline - time.monotonic()))
                if rank.failed.get(step, (-1, ""))[0] != calls:
                    why = f"{rank} {rank.ended}" if rank.ended else f"a step failed on rank 0, and not alike on {rank}"
                    raise RankLost(f"{why}: {type(error).__name__}: {error}") from error
                del rank.failed[step]

    def waiting_for(self) -> str:
        """Who holds up the step, in words; empty: nobody does."""
        late = [rank for rank in self._ranks if rank.number in self._stamps.late()]
        return ", ".join(f"{rank} has not moved for {self._stamps.silent_s(rank.number):.0f} s" for rank in late)

    @property
    def kv_links(self) -> list[socket.socket]:
        """To the other ranks, in their order: of whoever moves KV, who closes them."""
        return [rank.kv_link for rank in self._ranks]

    @property
    def processes(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks if rank.process is not None]

    def close(self) -> None:
        """Ends the other ranks. Idempotent."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.link.shutdown(socket.SHUT_RDWR)
        for rank in self._ranks:
            if rank.process is not None:
                try:
                    rank.process.wait(_END_S)
                except subprocess.TimeoutExpired:
                    rank.process.kill()
                    rank.process.wait()
        self._thread.join(_END_S)
        for link in (self._wake, self._woken, *(r.link for r in self._ranks), *(r.kv_link for r in self._ranks)):
            link.close()
        os.close(self._stamps_fd)

    # Watching.

    def _watch(self) -> None:
        """Starts the processes, too: they end with this thread."""
        looks = selectors.DefaultSelector()
        looks.register(self._woken, selectors.EVENT_READ)
        try:
            for number in range(1, self.place.degree):
                (ours, theirs), (kv, their_kv) = socket.socketpair(), socket.socketpair()
                rank = _Rank(number, ours, kv)
                with theirs, their_kv:
                    passed = [theirs.fileno(), their_kv.fileno(), self._stamps_fd, self._meeting_fd]
                    rank.process = start_process(number, passed)
                send(ours, Kind.HELLO, self._hello(number))
                self._ranks.append(rank)
                looks.register(ours, selectors.EVENT_READ, rank)
        except OSError as error:
            with self._changed:
                self._ranks.append(_Rank(number, *socket.socketpair(), ended=f"cannot be started ({error})"))
                self._changed.notify_all()
            return
        with looks:
            while not self._closing:
                for key, _ in looks.select():
                    if key.data is not None and not self._hear(key.data):
                        looks.unregister(key.fileobj)

    def _hello(self, rank: int) -> bytes:
        return json.dumps(
            {
                "config": self._config.model_dump(mode="json"),
                "rank": rank,
                "logging": logging.getLogger().getEffectiveLevel(),
            }
        ).encode()

    def _hear(self, rank: _Rank) -> bool:
        """False: there is nothing more to hear."""
        said = receive(rank.link)
        with self._changed:
            if said is None:
                rank.ended = _how_it_ended(rank.process)
                if rank.ready and not self._closing:
                    self._report(RankLost(f"{rank} {rank.ended}"))
            else:
                kind, content = said
                if kind is Kind.HERE:
                    rank.here = True
                elif kind is Kind.READY:
                    rank.ready = True
                elif kind is Kind.REFUSED:
                    rank.refused = content.decode()
                elif kind is Kind.FAILED:
                    step, calls = FAILURE.unpack_from(content)
                    cause = content[FAILURE.size :].decode()
                    rank.failed[step] = (calls, cause)
                    threading.Thread(target=self._not_alone, args=(rank, step, cause), daemon=True).start()
            self._changed.notify_all()
        return said is not None

    def _not_alone(self, rank: _Rank, step: int, cause: str) -> None:
        """A rank failed. If it fails here as well, `settle` knows; if this process still computes, it waits in vain."""
        time.sleep(_KNOWN_S)
        if self._in_step and self._step == step:
            self._report(RankLost(f"{rank} failed in a step and the others did not: {cause}"))

    def _report(self, lost: RankLost) -> None:
        if hasattr(self, "group"):
            self.group.why_lost = self.group.why_lost or str(lost)
        if self._why is not None:
            return
        self._why = lost
        log.critical("%s; the worker ends", lost)
        if self._on_lost is not None:
            self._on_lost(lost)

    def explained(self, lost: RankLost) -> RankLost:
        """With the cause, if that becomes known."""
        return self._lost(str(lost))

    def _lost(self, otherwise: str) -> RankLost:
        deadline = time.monotonic() + _KNOWN_S
        with self._changed:
            while time.monotonic() < deadline:
                gone = next((rank for rank in self._ranks if rank.ended or rank.refused), None)
                if gone is not None:
                    return RankLost(f"{gone} {gone.refused or gone.ended}")
                self._changed.wait(max(0.0, deadline - time.monotonic()))
        return RankLost(otherwise)

    def _wait(self, done: Callable[[_Rank], bool], limit_s: float, late: str) -> None:
        deadline = time.monotonic() + limit_s
        with self._changed:
            while True:
                gone = next((rank for rank in self._ranks if rank.ended or rank.refused), None)
                if gone is not None:
                    raise RankLost(f"{gone} {gone.refused or gone.ended}")
                if len(self._ranks) == self.place.degree - 1 and all(map(done, self._ranks)):
                    return
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    slow = next((rank for rank in self._ranks if not done(rank)), "a rank")
                    raise RankLost(f"{slow} {late} for {limit_s:.0f} s; see its log above, and whether memory is short")
                self._changed.wait(left_s)


def _how_it_ended(process: subprocess.Popen[bytes] | None) -> str:
    try:
        code = None if process is None else process.wait(_KNOWN_S)
    except subprocess.TimeoutExpired:
        code = None
    if code is None:
        return "has closed its link"
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory, perhaps: see the kernel's log)" if code == -9 else "")
    return f"has ended with exit code {code}; its log is above"


class Led:
    """A Forward that all ranks compute."""

    def __init__(self, own: Forward, leader: Leader) -> None:
        self._own = own
        self._leader = leader
        self.backend: Any = getattr(own, "backend", None)

    @property
    def name(self) -> str:
        place = self._leader.place
        groups = f", experts in {place.expert_groups} groups" if place.expert_groups > 1 else ""
        return f"{self._own.name}, {place.degree} ranks{groups}"

    def forward(
        self,
        kv: KvPool,
        token_ids: Sequence[int],
        positions: Sequence[int],
        chunks: list[Chunk],
        keep: Sequence[int],
        arriving: Arriving | None = None,
    ) -> torch.Tensor:
        assert arriving is None, "steps of several ranks do not overlap"
        self._leader.tell(encode(token_ids, positions, chunks, keep))
        try:
            logits = self._own.forward(kv, token_ids, positions, chunks, keep)
        except BaseException as error:
            self._leader.settle(error)
            raise
        self._leader.told()
        return logits
