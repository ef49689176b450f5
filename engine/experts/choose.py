"""What computes the experts of a model: decided once, at start, each candidate held against the module itself.

1. transformers loads the model with its plain loop ("eager"), and the reference of the position trial is taken so.
2. `group_experts` gives each module of experts the first candidate that can and that agrees: native kernels on CPU,
   transformers' grouped products on CUDA, a product for each expert that was chosen, and last its own loop.
3. Through transformers' experts interface the module calls it from then on. Which experts a row goes to, with which
   weights, is the model's own code before and after.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from engine.experts.grouped import GroupedMm, TorchExperts
from engine.experts.load import ExpertLoad
from engine.experts.parts import ExpertsModule, experts_of
from engine.native.experts import NativeExperts, obstacle_to_native_experts
from engine.native.library import Library
from engine.quantization import Quantized, quantized

log = logging.getLogger(__name__)

EXPERTS_NAME = "diptych_grouped"
PLAIN = "eager"  # transformers' loop
_ATTRIBUTE = "diptych_experts"
# Of a row's root mean square, for the row that is furthest off; in narrow types their loop rounds each sum.
_ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Grouped(Protocol):
    """x [rows, hidden], chosen and weights [rows, choices] -> [rows, hidden]. `load`: engine/experts/load.py."""

    name: str
    load: torch.Tensor

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor: ...


def group_experts(model: Any, library: Library | None) -> ExpertLoad | None:
    """None for a model without experts, or with a class of them that keeps its own loop."""
    chosen: list[Grouped] = []
    configs: dict[int, Any] = {}
    small = quantized(model)
    for experts in experts_of(model):
        module, grouped = experts.module, _choose(experts, library, small)
        chosen.append(grouped)
        setattr(module, _ATTRIBUTE, grouped)
        if experts.dense:
            module.forward = _Dense(experts.count, grouped)
        elif hasattr(module, "config"):
            configs[id(module.config)] = module.config
        else:
            module.forward = grouped
    if not chosen:
        return None
    _register()
    for config in configs.values():
        config._experts_implementation = EXPERTS_NAME
    kinds = Counter(grouped.name for grouped in chosen)
    log.info("experts run on %s", ", ".join(f"{name} ({count} layers)" for name, count in kinds.items()))
    return ExpertLoad([grouped.load for grouped in chosen], [grouped.name for grouped in chosen])


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def forward(module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return getattr(module, _ATTRIBUTE)(x, chosen, weights)

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, forward)


def _candidates(
    experts: ExpertsModule, library: Library | None, small: Quantized | None
) -> Iterator[Callable[[], Grouped]]:
    device = experts.up.device.type
    if library is not None and device == "cpu":
        obstacle = obstacle_to_native_experts(experts)
        if obstacle is None:
            yield lambda: _native(library, experts, small)
        else:
            log.info("%s does not run on native kernels: %s", type(experts.module).__name__, obstacle)
    if device == "cuda" and not experts.dense:
        yield lambda: GroupedMm(experts)
    yield lambda: TorchExperts(experts)


def _native(library: Library, experts: ExpertsModule, small: Quantized | None) -> NativeExperts:
    return NativeExperts(library, experts, None if small is None else small.alike(experts.paths))


@torch.no_grad()
def _choose(experts: ExpertsModule, library: Library | None, small: Quantized | None) -> Grouped:
    count, device = experts.count, experts.up.device
    generator = torch.Generator().manual_seed(0)
    hidden = experts.rows(experts.up, 0).shape[1]
    x = torch.randn(count, hidden, generator=generator).to(device, experts.up.dtype)
    lines = torch.arange(count, device=device)[:, None]
    chosen = torch.cat([lines, (lines + 1) % count], dim=1)[:, : min(2, count)]  # each expert has had rows
    weights = (torch.rand(chosen.shape, generator=generator) + 0.25).to(device, experts.up.dtype)
    right = experts.alone(x, chosen, weights).float()
    for make in _candidates(experts, library, small):
        try:
            grouped = make()
            off = (grouped(x, chosen, weights).float() - right).square().mean(-1).sqrt()
            worst = (off / right.square().mean(-1).sqrt().clamp(min=1e-20)).max().item()
        except Exception:
            log.warning("experts of %s cannot be grouped so", type(experts.module).__name__, exc_info=True)
            continue
        if not worst <= _ALLOWED.get(x.dtype, 1e-3):  # a NaN is no agreement
            log.warning("%s differs from %s's loop by %.2g", grouped.name, type(experts.module).__name__, worst)
            continue
        grouped.load.zero_()
        if isinstance(grouped, NativeExperts):
            experts.release()
            if small is not None:
                small.kept.update(small.paths & {*experts.paths})
        return grouped
    return Alone(experts)


class Alone:
    """The module's own loop, behind the interface."""

    name = "transformers' loop"

    def __init__(self, experts: ExpertsModule) -> None:
        self._experts = experts
        self.load = torch.zeros(experts.count, dtype=torch.int64, device=experts.up.device)

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._experts.alone(x, chosen, weights)


class _Dense:
    """In place of a module that is given every row for every expert: only rows that are not zero are computed."""

    def __init__(self, count: int, grouped: Grouped) -> None:
        self._count, self._grouped = count, grouped

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        places = x.any(-1).nonzero()[:, 0]
        rows = x[places]
        chosen = (places // (len(x) // self._count))[:, None]
        out = torch.zeros_like(x)
        if len(places):
            out[places] = self._grouped(rows, chosen, rows.new_ones(chosen.shape))
        return out
