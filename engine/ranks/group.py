"""The processes of one worker, as they compute together: sums and joins between them, over torch.distributed.

gloo carries them over loopback on CPU, NCCL between GPUs (not yet run on a GPU). Ranks that share a device meet in main
memory. A sum is a gather and additions in the order of ranks: so it has the same bits on every rank, whatever the size
of a step, and a row's sum does not depend on the rows beside it.

`stamps` is memory that all ranks see: each says there how far it has come, so that the leader can name who is late.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from engine.model_errors import RankLost
from engine.ranks.place import Place

STAMPS = 3  # of a rank: its step, calls within it, and when it last moved (monotonic, ns)
_TIMEOUT = timedelta(seconds=600)  # of one call; the worker's watchdog is earlier where answers wait


class Stamps:
    """[degree, STAMPS]; each rank writes its own row."""

    def __init__(self, fd: int, degree: int) -> None:
        size = degree * STAMPS * 8
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        self._pages = mmap.mmap(fd, size)
        self.rows = np.frombuffer(self._pages, dtype=np.int64).reshape(degree, STAMPS)

    def late(self) -> list[int]:
        """Ranks that stand behind another."""
        places = [(int(step), int(calls)) for step, calls, _ in self.rows]
        return [rank for rank, place in enumerate(places) if place < max(places)]

    def silent_s(self, rank: int) -> float:
        return max(0.0, (time.monotonic_ns() - int(self.rows[rank, 2])) / 1e9)


def meeting_at(fd: int) -> str:
    """Memory without a name, as a file that this process can open."""
    return f"/proc/self/fd/{fd}"


class Group:
    """All ranks make one, with the same file at `meeting`, which is empty and theirs alone. It must be there for as
    long as the group is: whoever lets go of the store looks at it once more.
    """

    def __init__(self, place: Place, meeting: str, stamps: Stamps, device: torch.device) -> None:
        import torch.distributed

        distributed: Any = torch.distributed  # whose stubs lack what follows
        self.place = place
        self.why_lost = ""  # set by who knows more
        self._stamp = stamps.rows[place.rank]
        store = distributed.FileStore(meeting, place.degree)
        store.set_timeout(timedelta(seconds=60))
        gloo = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = _TIMEOUT
        self._gloo = gloo(distributed.PrefixStore("gloo", store), place.rank, place.degree, options)
        self._device_group: Any = None
        if device.type == "cuda" and torch.cuda.device_count() >= place.degree:
            nccl = distributed.PrefixStore("nccl", store)
            self._device_group = distributed.ProcessGroupNCCL(nccl, place.rank, place.degree)

    @property
    def calls(self) -> int:
        """Since the step began."""
        return int(self._stamp[1])

    def begin(self, step: int) -> None:
        self._stamp[0], self._stamp[1], self._stamp[2] = step, 0, time.monotonic_ns()

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """[...] -> [degree, ...]. Raises RankLost."""
        self._stamp[1] += 1
        self._stamp[2] = time.monotonic_ns()
        group: Any = self._gloo if self._device_group is None else self._device_group
        sent = part.reshape(-1)
        if group is self._gloo:
            sent = sent.cpu()
        out = sent.new_empty(self.place.degree * sent.numel())
        try:
            group._allgather_base(out, sent).wait()
        except RuntimeError as error:
            raise RankLost(self._lost(error)) from error
        return out.view(self.place.degree, *part.shape).to(part.device)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        parts = self.gather(part)
        if part.dtype in (torch.float32, torch.float64):
            total = parts[0] + parts[1]
            for rank in range(2, self.place.degree):
                total += parts[rank]
            return total
        total = parts[0].float()
        for rank in range(1, self.place.degree):
            total += parts[rank]
        return total.to(part.dtype)

    def join(self, part: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        widest = max(sizes)
        padded = torch.nn.functional.pad(part, (0, widest - part.shape[-1])) if part.shape[-1] < widest else part
        return torch.cat([one[..., :size] for one, size in zip(self.gather(padded), sizes, strict=True)], dim=-1)

    def least(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """Of each number, the smallest of all ranks."""
        return tuple(self.gather(torch.tensor(list(numbers), dtype=torch.int64)).amin(0).tolist())

    def differing(self, text: str) -> list[int]:
        """Ranks that say something else than the leader."""
        said = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
        found = self.gather(said)
        return [rank for rank in range(self.place.degree) if not torch.equal(found[rank], found[0])]

    def _lost(self, error: RuntimeError) -> str:
        return self.why_lost or (
            f"a rank of this worker has ended, or its link ({str(error).strip().splitlines()[0][:160]})"
        )
