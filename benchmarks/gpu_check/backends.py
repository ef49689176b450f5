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

import torch

from benchmarks.gpu_check.context import Check
from engine.attention.choose import LIBRARIES, AttentionShape, obstacle_to
from engine.attention.grouped import GroupedBackend


@dataclass(frozen=True, slots=True)
class Found:
    """`absent` says why a backend does not run here; `backend` is then None."""

    module: str
    name: str
    backend: Any
    absent: str = ""

    def obstacle(self, check: Check, shape: AttentionShape) -> str:
        """Why it does not serve this shape, in the engine's own words; empty: it does, as far as is known."""
        library = _library(self.module)
        if library not in LIBRARIES or not check.on_gpu:
            return ""
        return obstacle_to(library, torch.cuda.get_device_capability(check.device), shape, installed=True) or ""

    def another(self) -> Any:
        """A backend of its own for each group: some keep plans of the steps in flight."""
        return type(self.backend)()


def serving_groups(check: Check, runner: Any) -> tuple[list[tuple[str, Any]], dict[str, str]]:
    """Backends that serve every group of a runner's model, by name; and why others do not."""
    facts, block_tokens = runner.facts, runner.block_tokens
    shapes = [
        None if g.rule.state else AttentionShape.of(g, facts.heads, block_tokens, facts.extras) for g in facts.groups
    ]
    found: list[tuple[str, Any]] = []
    not_served: dict[str, str] = {}
    for backend in find_backends(check):
        why = backend.absent or next((o for s in shapes if s is not None and (o := backend.obstacle(check, s))), "")
        if why:
            not_served[backend.name] = why
            continue
        own = [None if shape is None else backend.another() for shape in shapes]
        found.append((backend.name, own[0] if runner.shape.is_plain else GroupedBackend(facts.groups, own)))
    return found, not_served


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


def _library(module: str) -> str:
    return module.removesuffix("_paged")


def _obstacle(check: Check, module: Any, name: str) -> str:
    if name in check.without:
        return "it broke the device in an earlier section"
    if _library(module.__name__.rpartition(".")[2]) in LIBRARIES and not check.on_gpu:
        return "its kernels need a CUDA device"
    return ""
