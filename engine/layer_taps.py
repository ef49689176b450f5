"""A model's decoder layers, looked at one by one while it runs.

Through many layers a rounding grows, and in a trained model one layer's fault may end as small as that. So the trial at
start gives each layer what it was given in the reference (`replaced`), and compares what that layer alone makes of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class Tapped:
    """By layer, in order: hidden states in and out, [..., T, hidden]. Empty where the model has no layers to tap."""

    inputs: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    outputs: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    broken: bool = False  # a layer ran twice, or its hidden states are not where we look for them

    @property
    def usable(self) -> bool:
        return bool(self.outputs) and not self.broken and self.inputs.keys() == self.outputs.keys()

    def check(self, tokens: int) -> None:
        """Streams of other shapes, as of several beside each other, are not looked at."""
        states = (*self.inputs.values(), *self.outputs.values())
        self.broken |= any(s.dim() < 2 or s.shape[-2] != tokens for s in states)

    def append(self, step: Tapped, packed: slice) -> None:
        """These rows of a step, behind what is here."""
        for own, new in ((self.inputs, step.inputs), (self.outputs, step.outputs)):
            for layer, states in new.items():
                part = states[..., packed, :]
                own[layer] = torch.cat((own[layer], part), dim=-2) if layer in own else part


def rows(states: torch.Tensor) -> torch.Tensor:
    """[..., T, hidden] -> [T, everything], float32."""
    return states.movedim(-2, 0).reshape(states.shape[-2], -1).float()


@contextlib.contextmanager
def tapped(model: Any, replaced: Mapping[int, torch.Tensor] | None = None) -> Iterator[Tapped]:
    """Notes what each layer got and made; with `replaced` it gets that instead (its own input is noted)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = Tapped()
    handles: list[Any] = []
    inside: set[int] = set()
    layers: list[torch.nn.Module] = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            layers.append(module)
            inside |= {id(part) for part in module.modules()}

    def tap(index: int, layer: torch.nn.Module) -> None:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(states, torch.Tensor) or index in found.inputs:
                found.broken = True
                return None
            found.inputs[index] = states
            if replaced is None or index not in replaced:
                return None
            given = replaced[index].to(states)
            if given.shape[-2] < states.shape[-2]:  # the packed row is padded
                given = torch.cat((given, states[..., given.shape[-2] :, :]), dim=-2)
            return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

        def after(_: Any, __: Any, answer: Any) -> None:
            states = answer[0] if isinstance(answer, tuple) else answer
            if isinstance(states, torch.Tensor):
                found.outputs[index] = states
            else:
                found.broken = True

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))

    for index, layer in enumerate(layers):
        tap(index, layer)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class TapsItself:
    """A model that computes its layers by code of its own. While it is tapped, that code finds `_taps`: it gives each
    layer its part of the first, and notes what the layer got and made in the second.
    """

    _taps: tuple[Mapping[int, torch.Tensor], Tapped] | None = None

    @contextlib.contextmanager
    def tapped(self, replaced: Mapping[int, torch.Tensor]) -> Iterator[Tapped]:
        found = Tapped()
        self._taps = replaced, found
        try:
            yield found
        finally:
            self._taps = None


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Each module computes in float32 while it runs: at no time is more than a module's weights there twice."""
    kept: dict[int, list[list[tuple[torch.nn.Parameter, torch.Tensor]]]] = {}

    def widen(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        own = [(p, p.data) for p in module.parameters(recurse=False) if p.is_floating_point()]
        kept.setdefault(id(module), []).append(own)
        for parameter, data in own:
            parameter.data = data.float()
        # Code that looks at the module's type before it calls it narrows what it hands over.
        return tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)

    def narrow(module: torch.nn.Module, *_: Any) -> None:
        for parameter, data in kept[id(module)].pop():
            parameter.data = data

    hooks: list[Any] = []
    try:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                hooks.append(module.register_forward_pre_hook(widen))
                hooks.append(module.register_forward_hook(narrow, always_call=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
