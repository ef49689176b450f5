"""A worker process whose other ranks are forked as it was, in place of started anew (tests/support/zygote.py).

    this process ── descriptors ──> nursery, forked before there is any thread here; forks twice, as the zygote does
                 <── adopts ──────  the rank

The ranks then do what `python -m engine.ranks.follower` does, as children of this process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import sys
import threading

import psutil

from engine.ranks import follower, leader
from settings.phases import FILE_VARIABLE
from settings.process import LAST_WORDS
from tests.support.paced_worker import role_of, serve
from tests.support.zygote import PR_SET_PDEATHSIG, Adopted, adopt_orphans
from worker.main import run

_FEW = 8  # descriptors of a rank, at most
_PID = struct.Struct("=i")
_PR_SET_NAME = 15
_NAME = "diptych rank"


def ranks_of(worker: int) -> list[psutil.Process]:
    """Its other ranks, begun in either way."""
    found = psutil.Process(worker).children()
    return [p for p in found if p.name() == _NAME or "engine.ranks.follower" in p.cmdline()]


class Nursery:
    def __init__(self) -> None:
        self._link, theirs = socket.socketpair()
        self._lock = threading.Lock()
        worker = os.getpid()
        if not os.fork():
            self._link.close()
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            self._keep(theirs, worker)
        theirs.close()

    def start(self, _: int, descriptors: list[int]) -> Adopted:
        """In place of engine.ranks.leader.start_process."""
        with self._lock:
            adopt_orphans(True)
            try:
                socket.send_fds(self._link, [b"x"], descriptors)
                pid = _PID.unpack(self._link.recv(_PID.size, socket.MSG_WAITALL))[0]
                assert self._link.recv(1) == b"g", "the nursery has ended"
            finally:
                adopt_orphans(False)
        return Adopted([sys.executable, "-m", "engine.ranks.follower"], pid)

    @staticmethod
    def _keep(link: socket.socket, worker: int) -> None:
        """Does not return."""
        while True:
            said, descriptors, _, _ = socket.recv_fds(link, 1, _FEW)
            if not said:
                os._exit(0)
            parent = os.fork()
            if not parent:
                pid = os.fork()
                if pid:
                    link.send(_PID.pack(pid))
                    os._exit(0)
                link.close()
                _become(descriptors, worker)
            for descriptor in descriptors:
                os.close(descriptor)
            os.waitpid(parent, 0)
            link.send(b"g")


def _become(descriptors: list[int], worker: int) -> None:
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, _NAME.encode(), 0, 0, 0)
        for ours in (FILE_VARIABLE, LAST_WORDS):
            os.environ.pop(ours, None)
        while os.getppid() != worker:  # adopted when who has forked it is gone, in a moment
            os.sched_yield()
        code = follower.main(*descriptors, worker)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    leader.start_process = Nursery().start
    run(role_of(sys.argv), serve)
