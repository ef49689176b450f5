"""A module of experts, whatever class of transformers' it is: its weights as products need them, and its own answer.

Classes with transformers' experts interface say how their weights lie. Others keep their own loop, but for those of
`_KNOWN`, which differ from it in nothing that matters here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Routed = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# is_transposed, and whether it is given every row once for each expert, zeros where the router chose another.
_KNOWN = {"Llama4TextExperts": (True, True), "Step3p7Experts": (False, False)}
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """`gate`: of what the first product gives, [rows, columns] -> [rows, inner]."""

    path: str  # of the module
    module: Any
    count: int
    gated: bool
    transposed: bool
    interleaved: bool  # gate, up, gate, up ...; else all gates first
    dense: bool  # see _KNOWN

    @property
    def paths(self) -> tuple[str, str]:
        """Of the weights of the first product and the second, as parameters."""
        up = "gate_up_proj" if self.gated else "up_proj"
        return f"{self.path}.{up}", f"{self.path}.down_proj"

    @property
    def up(self) -> torch.Tensor:
        return (self.module.gate_up_proj if self.gated else self.module.up_proj).detach()

    @property
    def down(self) -> torch.Tensor:
        return self.module.down_proj.detach()

    @property
    def up_bias(self) -> torch.Tensor | None:
        return self._bias("gate_up_proj_bias" if self.gated else "up_proj_bias")

    @property
    def down_bias(self) -> torch.Tensor | None:
        return self._bias("down_proj_bias")

    def rows(self, weight: torch.Tensor, expert: int) -> torch.Tensor:
        """One expert's weight as [out, in]."""
        return weight[expert].t() if self.transposed else weight[expert]

    def gate(self, first: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return self.module.act_fn(first)
        own = getattr(self.module, "_apply_gate", None)
        if own is not None:
            return own(first)
        gate, up = first.chunk(2, dim=-1)
        return self.module.act_fn(gate) * up

    def normed(self, second: torch.Tensor) -> torch.Tensor:
        return self.module.post_expert_norm(second) if self.has_norm else second

    @property
    def has_norm(self) -> bool:
        return bool(getattr(self.module, "has_post_expert_norm", False))

    def alone(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the module computes by itself."""
        own = type(self.module).forward
        own = getattr(own, "__wrapped__", own)
        if not self.dense:
            return own(self.module, x, chosen, weights)
        out = torch.zeros_like(x)
        for choice in range(chosen.shape[1]):
            given = x.new_zeros(self.count, *x.shape)
            lines = torch.arange(len(x), device=x.device)
            given[chosen[:, choice], lines] = x
            each = own(self.module, given.flatten(0, 1)).view(given.shape)
            out += each[chosen[:, choice], lines] * weights[:, choice, None]
        return out

    def release(self) -> None:
        """Gives the weights up: something else has a copy."""
        for name in _WEIGHTS:
            old = getattr(self.module, name, None)
            if isinstance(old, torch.nn.Parameter):
                setattr(self.module, name, torch.nn.Parameter(old.new_empty(0), requires_grad=False))

    def _bias(self, name: str) -> torch.Tensor | None:
        found = getattr(self.module, name, None) if getattr(self.module, "has_bias", False) else None
        return None if found is None else found.detach()


def experts_of(model: Any) -> Iterator[ExpertsModule]:
    """In order of layers."""
    for path, module in model.named_modules():
        known = _KNOWN.get(type(module).__name__)
        if known is not None:
            transposed, dense = known
            yield ExpertsModule(path, module, module.num_experts, True, transposed, False, dense)
        elif hasattr(module, "is_concatenated") and hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            gated = module.has_gate
            count = (module.gate_up_proj if gated else module.up_proj).shape[0]
            yield ExpertsModule(path, module, count, gated, module.is_transposed, not module.is_concatenated, False)
