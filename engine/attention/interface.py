"""What transformers calls in place of its own attention, and what a backend must do.

The batch is packed: all new tokens of a step in one row of length T, decodes first, then chunks of prompts. A backend
writes the new keys and values of a layer into the pool, then attends over each sequence's blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

ATTENTION_NAME = "diptych_paged"


class AttentionRefused(NotImplementedError):
    """A layer asks for what would be computed wrongly."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence's new tokens [first_row, first_row + num_tokens) of the packed row; `start` precede them."""

    first_row: int
    num_tokens: int
    start: int
    block_ids: list[int]


class StepBatch(Protocol):
    """A backend's own view of one step: built once a step, used by every layer."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim] -> [1, T, heads, head_dim]."""
        ...


class WrittenBatch(StepBatch, Protocol):
    """A batch that lets others write keys and values: what computes them may do so in one go (engine/fused)."""

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pool, and block and slot of each new token [T]; block -1: nowhere."""
        ...

    def attend_written(self, layer: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """`attend`, where keys and values are in the pool already."""
        ...


class AttentionBackend(Protocol):
    name: str

    def prepare(self, kv: torch.Tensor, chunks: list[Chunk]) -> StepBatch:
        """`kv` is the pool [num_blocks, layers, 2, kv_heads, block_tokens, head_dim]."""
        ...


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    diptych_step: StepBatch | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Registered with transformers. Refuses what it would compute wrongly rather than compute it."""
    if diptych_step is None:
        raise AttentionRefused(
            f"{type(module).__name__} does not pass keyword arguments to its attention; it cannot be served"
        )
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise AttentionRefused(f"{type(module).__name__} uses {name}, which is not supported")
    if attention_mask is not None:
        raise AttentionRefused(f"{type(module).__name__} builds its own attention mask; it cannot be served")
    if value.shape[-1] != query.shape[-1] or not getattr(module, "is_causal", True):
        raise AttentionRefused(f"{type(module).__name__} is not standard causal attention; it cannot be served")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return diptych_step.attend(module.layer_idx, query, key, value, scale), None


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)
