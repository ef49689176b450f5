"""Every attention backend in engine/attention, found by what it is rather than by name.

A backend is a class with a `name` and a `prepare`, made without arguments, in a module of its own: what is added
there later is picked up here.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_check.context import Check


@dataclass(frozen=True, slots=True)
class Found:
    """`absent` says why a backend does not run here; `backend` is then None."""

    module: str
    name: str
    backend: Any
    absent: str = ""

    def obstacle(self, check: Check, heads: int, kv_heads: int, head_dim: int, block_tokens: int, dtype: Any) -> str:
        """Why it does not serve this shape, in the engine's own words; empty: it does, as far as is known."""
        import torch

        from engine.attention.choose import LIBRARIES, AttentionShape, obstacle_to

        library = self.module.removesuffix("_paged")
        if library not in LIBRARIES or not check.on_gpu:
            return ""
        shape = AttentionShape(heads, kv_heads, head_dim, block_tokens, dtype)
        return obstacle_to(library, torch.cuda.get_device_capability(check.device), shape, installed=True) or ""


def serving(check: Check, heads: int, kv_heads: int, head_dim: int, block_tokens: int, dtype: Any) -> list[Found]:
    found = [f for f in find_backends(check) if not f.absent]
    return [f for f in found if not f.obstacle(check, heads, kv_heads, head_dim, block_tokens, dtype)]


def find_backends(check: Check) -> list[Found]:
    from engine import attention

    found: list[Found] = []
    for info in pkgutil.iter_modules(attention.__path__):
        try:
            module = importlib.import_module(f"engine.attention.{info.name}")
        except ImportError as error:
            found.append(Found(info.name, info.name, None, f"does not load: {error}"))
            continue
        members: list[tuple[str, Any]] = inspect.getmembers(module, inspect.isclass)
        for _, member in members:
            make: Any = member
            name = getattr(make, "name", None)
            own = make.__module__ == module.__name__ and not getattr(make, "_is_protocol", False)
            if not (own and isinstance(name, str) and callable(getattr(make, "prepare", None))):
                continue
            why = _obstacle(check, module, name)
            backend = None
            if not why:
                try:
                    backend = make()
                except ImportError as error:
                    why = f"does not load: {error}"
            found.append(Found(info.name, name, backend, why))
    assert any(f.module == "gather" for f in found), "the gather backend was not found"
    return found


def _obstacle(check: Check, module: Any, name: str) -> str:
    if name in check.without:
        return "it broke the device in an earlier section"
    if hasattr(module, "triton") and not check.on_gpu:
        return "Triton kernels need a CUDA device"
    return ""
