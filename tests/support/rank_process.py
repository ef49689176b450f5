"""A rank of a reader in a process of its own, over memory that the test sees too:
`python -m tests.support.rank_process LINK MEMORY AREAS`, descriptors and JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

from kv_transfer.nixl_transport import NixlTransport
from kv_transfer.rank_link import serve_rank
from tests.support.kv_pool import ROOT, Pool, Shape


def shared(fd: int, areas: Sequence[Shape], poison: int) -> Pool:
    size = Pool.bytes_of(areas)
    if os.fstat(fd).st_size < size:
        os.ftruncate(fd, size)
    return Pool(areas, poison, np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8))


class RankProcess:
    """`link` leads to it, `pool` is its memory."""

    def __init__(self, areas: Sequence[Shape], poison: int) -> None:
        memory = os.memfd_create("rank")
        self.pool = shared(memory, areas, poison)
        self.link, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(memory), json.dumps(areas)],
                cwd=ROOT,
                pass_fds=[theirs.fileno(), memory],
            )
        os.close(memory)

    def close(self) -> None:
        """Its transport was closed."""
        self.link.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main() -> None:
    link, memory = (int(text) for text in sys.argv[1:3])
    areas = [(count, size) for count, size in json.loads(sys.argv[3])]
    fill = np.frombuffer(mmap.mmap(memory, Pool.bytes_of(areas)), dtype=np.uint8)
    pool = Pool(areas, int(fill[0]), fill)
    serve_rank(socket.socket(fileno=link), pool.memory(), NixlTransport)


if __name__ == "__main__":
    main()
