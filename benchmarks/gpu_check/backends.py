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


def find_backends(check: Check) -> list[Found]:
    from engine import attention
    from engine.attention.interface import AttentionBackend

    found: list[Found] = []
    for info in pkgutil.iter_modules(attention.__path__):
        try:
            module = importlib.import_module(f"engine.attention.{info.name}")
        except ImportError as error:
            found.append(Found(info.name, info.name, None, f"does not load: {error}"))
            continue
        for _, found_class in inspect.getmembers(module, inspect.isclass):
            member: Any = found_class
            own = member.__module__ == module.__name__ and found_class is not AttentionBackend
            if not (
                own and callable(getattr(member, "prepare", None)) and isinstance(getattr(member, "name", None), str)
            ):
                continue
            if hasattr(module, "triton") and not check.on_gpu:
                found.append(Found(info.name, member.name, None, "Triton kernels need a CUDA device"))
                continue
            found.append(Found(info.name, member.name, member()))
    assert any(f.module == "gather" and f.backend is not None for f in found), "the gather backend was not found"
    return found
