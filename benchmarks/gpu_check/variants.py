"""The settings of an engine that are compared: whose layers, graphs or not. Each is one runner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_check.context import Check


@dataclass(frozen=True, slots=True)
class Variant:
    """`every_backend`: run over all attention backends, not only the engine's own choice."""

    label: str
    options: dict[str, Any]
    every_backend: bool = False


def variants(check: Check) -> list[Variant]:
    """A CPU stand-in, and a device that something broke, have transformers' own layers alone."""
    plain = check.engine_options() | {"cuda_graphs": False, "max_running_sequences": 256}
    found = [Variant("", plain, every_backend=True)]
    if check.on_gpu and not check.without:
        fused = plain | {"kernels": "auto"}
        found += [
            Variant("graphs", plain | {"cuda_graphs": True}),
            Variant("fused layers", fused),
            Variant("fused layers, graphs", fused | {"cuda_graphs": True}),
        ]
    return found


def record_graphs(runner: Any) -> None:
    """What a worker does between requests: shapes that were met, and those that are expected."""
    while runner.improve():
        pass


def took_effect(variant: Variant, runner: Any) -> str:
    """Empty, or what was asked for and is not there: a trial failed, say, or the backend has no graphs."""
    name = runner.forward.name
    for asked, shown in (("fused layers", "fused layers"), ("graphs", "CUDA graphs")):
        if asked in variant.label and shown not in name:
            return f"{variant.label}: not there; the engine runs {name}"
    return f"{variant.label}: {name}" if "given up" in name else ""
