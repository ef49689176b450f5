"""Whether an engine runs on our own CPU kernels, and how much of it: decided once, at start.

1. The kernels are compiled while the model loads (seconds, once a machine).
2. A model of the known shape runs whole as one native call a step, after a trial against transformers.
3. Any other runs in torch with native attention, after a trial against gather.
4. What stands in the way is said in the log; with engine.kernels = native it is an error.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from engine.attention.choose import AttentionShape, trial_of_attention
from engine.attention.interface import ExtrasUsed
from engine.attention.native import NativeBackend
from engine.kv_shape import KvShape
from engine.native import stack
from engine.native.build import NativeBuildError, built_library
from engine.native.library import DTYPES, WIDEST_HEAD, Library, load_library
from engine.native.stack import NativeStack
from engine.position_trial import Reference, disagreement
from engine.quantization import quantized

log = logging.getLogger(__name__)


class Building:
    """Compiles in a thread of its own from the moment it is made."""

    def __init__(self) -> None:
        self._error: NativeBuildError | None = None
        self._thread = threading.Thread(target=self._build, name="kernel-build", daemon=True)
        self._thread.start()

    def _build(self) -> None:
        try:
            built_library()
        except NativeBuildError as error:
            self._error = error

    def library(self, threads: int, cpus: tuple[int, ...]) -> Library:
        """Waits for the compiler, which has a deadline of its own. Raises NativeBuildError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return load_library(threads, cpus)


def native_stack(
    library: Library, model: Any, shape: KvShape, extras: ExtrasUsed, limit: int, reference: Reference
) -> NativeStack | str:
    """The model as one native call, or why not. The model's own layers are given up when it succeeds."""
    obstacle = f"its attention has {extras}" if extras else stack.obstacle_to_stack(model)
    if obstacle is not None:
        return obstacle
    group = shape.groups[0]
    made = NativeStack(library, model, group.width, group.kv_heads, limit, group.rounding)
    off = disagreement(made, reference, shape, torch.device("cpu"))
    if off:
        return off
    if (small := quantized(model)) is not None:
        small.kept.update(made.kept)
    model.model.layers = torch.nn.ModuleList()  # packed copies do their work; both would not fit
    return made


def native_attention(library: Library, shape: AttentionShape) -> NativeBackend | str:
    """Attention alone, or why not."""
    if shape.head_dim > WIDEST_HEAD:
        return f"the model's head_dim is {shape.head_dim}, above {WIDEST_HEAD}"
    if shape.dtype not in DTYPES:
        return f"it computes in float32 and bfloat16, and the model is {str(shape.dtype).removeprefix('torch.')}"
    backend = NativeBackend(library, shape.rows)
    return trial_of_attention(backend, torch.device("cpu"), shape) or backend
