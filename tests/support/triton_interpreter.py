"""Triton kernels on a machine without a GPU: import this before `triton`, and they run in numpy, program by program."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

ON_GPU = torch.cuda.is_available()


def _accept_numpy_2_4(interpreter: Any) -> None:
    """Triton 3.6 turns loop bounds into int(array of one element), which numpy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _multiply_bfloat16(interpreter: Any) -> None:
    """Triton 3.6 keeps bfloat16 as 16-bit integers and multiplies them as such."""
    original = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _accept_numpy_2_4(interpreter)
    _multiply_bfloat16(interpreter)
