"""Triton kernels on a machine without a GPU: import this before kernels, and they run in numpy, program by program.

Triton reads TRITON_INTERPRET when it is imported, for functions of its own. Libraries import it too, and any test may
have imported those: so it is tests/conftest.py, before all of them, that sets the variable.

What the interpreter leaves to numpy's libraries is computed here in an order of our own. A BLAS gives a row of a
product other bits for its place in the matrix, on some processors and not on others: a test of bits would test the
BLAS, not the kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.support.fixed_order import product, rounded, total

ON_GPU = torch.cuda.is_available()


def _accept_numpy_2_4(interpreter: Any) -> None:
    """Triton 3.6 turns loop bounds into int(array of one element), which numpy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _compute_in_our_order(interpreter: Any) -> None:
    """Also: Triton 3.6 keeps bfloat16 as 16-bit integers and multiplies them as such."""
    builder = interpreter.InterpreterBuilder

    def widened(handle: Any) -> np.ndarray:
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        assert d.data.dtype == np.float32, "of the accumulator"
        data = product(widened(a).astype(np.float32), widened(b).astype(np.float32), d.data)
        return interpreter.TensorHandle(data, d.dtype.scalar)

    builder.create_dot = create_dot
    for function in (np.exp, np.exp2, np.log, np.log2):
        evaluate = rounded(function)
        setattr(builder, f"create_{function.__name__}", lambda self, arg, f=evaluate: self.unary_op(arg, f))
    interpreter.ReduceOps.sum = lambda self, input: self.to_tensor(
        total(input.handle.data, self.axis, self.keep_dims), input.dtype
    )


if not ON_GPU:
    from triton.language import cdiv
    from triton.runtime import interpreter

    assert isinstance(cdiv, interpreter.InterpretedFunction), "triton was imported before TRITON_INTERPRET was set"
    _accept_numpy_2_4(interpreter)
    _compute_in_our_order(interpreter)
