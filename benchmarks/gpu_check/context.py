"""What a section is given: the device, how large to be, how long it may take, and where its findings go."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.report import median, table


class Absent(Exception):
    """What the section needs is not on this machine. Recorded as skipped, with the reason."""


class CheckFailed(AssertionError):
    """The section ran, and found something wrong."""


@dataclass(slots=True)
class Check:
    device: torch.device
    tiny: bool
    deadline: float  # time.monotonic(); a section looks at it between two measurements
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)  # findings by section, also of unfinished ones
    started: float = field(default_factory=time.monotonic)
    without: tuple[str, ...] = ()  # attention backends that broke the device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        table(header, rows)
        print(flush=True)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def device_works(self) -> bool:
        """An illegal access in one kernel fails every later call of the process."""
        try:
            self.synchronize()
            return bool(torch.ones(1, device=self.device).item() == 1)
        except RuntimeError:
            return False

    def engine_options(self) -> dict[str, Any]:
        """For every engine made here: not the kernels that broke the device, where that can be said."""
        from engine.config import EngineConfig

        wanted = {"kernels": "torch"}  # on a CPU stand-in too: what runs on a GPU is looked at
        if self.without:
            wanted["attention"] = "gather"
        return {key: value for key, value in wanted.items() if key in EngineConfig.model_fields}

    def free_memory(self) -> None:
        """Give cached device memory back, so that the next section (or process) finds it."""
        gc.collect()  # models hold themselves in circles
        if self.on_gpu and self.device_works():
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """On CPU a bound that keeps small machines alive."""
        return torch.cuda.mem_get_info(self.device)[0] if self.on_gpu else 1 << 30

    def seconds(self, call: Callable[[], Any], repeats: int, warm_up: int = 3) -> float:
        """Median of `repeats` calls, by CUDA events on a GPU: what the device took, without the launch."""
        for _ in range(warm_up):
            call()
        self.synchronize()
        if not self.on_gpu:
            times = []
            for _ in range(repeats):
                begun = time.perf_counter()
                call()
                times.append(time.perf_counter() - begun)
            return median(times)
        pairs = []
        for _ in range(repeats):
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        self.synchronize()
        return median([begin.elapsed_time(end) * 1e-3 for begin, end in pairs])


def significant(value: float, digits: int = 4) -> float:
    """For files: a figure without the digits that mean nothing."""
    return float(f"{value:.{digits}g}")
