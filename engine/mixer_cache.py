"""What a recurrent layer's mixer is given in place of transformers' cache."""

from __future__ import annotations

from typing import Any

import torch

from engine.attention.interface import AttentionRefused

Key = tuple[str, int]  # what kind of state, and its number among those of the layer
States = dict[Key, torch.Tensor]


class Kept:
    """What one mixer looks at in place of transformers' cache: its states of one sequence, or of a batch."""

    def __init__(self, layer: int, states: States | None = None) -> None:
        self._layer = layer
        self.states: States = states or {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._get("convolution", layer_idx, state_idx)

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Keeps the last `conv_kernel_size` columns, and returns those before and the new ones."""
        before = self._get("convolution", layer_idx, state_idx)
        if before is not None:
            size = before.shape[-1]
            columns = torch.cat((before, conv_states), dim=-1)
        else:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            columns = torch.nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        self._put("convolution", layer_idx, state_idx, columns[..., -size:])
        return columns

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._get("recurrent", layer_idx, state_idx)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        return self._put("recurrent", layer_idx, state_idx, recurrent_states)

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        return self._get("linear", layer_idx, 0)

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        self._put("linear", layer_idx, 0, linear_cache)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.states)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def _get(self, kind: str, layer: int, number: int) -> torch.Tensor | None:
        self._check(layer)
        return self.states.get((kind, number))

    def _put(self, kind: str, layer: int, number: int, state: torch.Tensor) -> torch.Tensor:
        """In the type that it had at first, as in transformers' cache."""
        self._check(layer)
        before = self.states.get((kind, number))
        self.states[kind, number] = state if before is None else state.to(before.dtype)
        return self.states[kind, number]

    def _check(self, layer: int) -> None:
        if layer != self._layer:
            raise AttentionRefused(f"the mixer of layer {self._layer} looks at the state of layer {layer}")
