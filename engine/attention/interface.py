"""What transformers calls in place of its own attention, and what a backend must do.

The batch is packed: all new tokens of a step in one row of length T, decodes first, then chunks of prompts. A backend
writes the new keys and values of a layer into the pool, then attends over each sequence's blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import pad

from kv_transfer.layout import FULL, Rule, StateUse

ATTENTION_NAME = "diptych_paged"
LATENT = "diptych_latent"  # the attribute by which a module has its Latent


class AttentionRefused(NotImplementedError):
    """A layer asks for what would be computed wrongly; the message ends "MODEL cannot be served: ..."."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence's new tokens [first_row, first_row + num_tokens) of the packed row; `start` precede them.

    `block_ids` is the block table in the layout's first group, `others` those in the groups after it (for a state group
    it is empty, and `state` says which slots). Entry i holds tokens [i * block_tokens, (i + 1) * block_tokens); -1
    stands for a block that the rule of its group has left behind: nobody may read it.

    `copies`: (from, to), by the numbers of all pools together, that are made before the step.
    """

    first_row: int
    num_tokens: int
    start: int
    block_ids: list[int]
    others: tuple[list[int], ...] = ()
    state: StateUse | None = None
    copies: Sequence[tuple[int, int]] = ()


def is_decode(chunk: Chunk) -> bool:
    return chunk.num_tokens == 1 and chunk.start > 0


def decodes_first(chunks: Sequence[Chunk]) -> int:
    """How many lead the step. The packed row has them in front."""
    count = sum(is_decode(c) for c in chunks)
    assert all(is_decode(c) for c in chunks[:count]), "decodes come first in a step"
    return count


@dataclass(frozen=True, slots=True)
class Extras:
    """What a layer does to its scores besides scaling them. `softcap`: score -> softcap * tanh(score / softcap), 0:
    none. `sinks` [heads]: a score for each head that takes part in the softmax and has no value; None: none.
    """

    softcap: float = 0.0
    sinks: torch.Tensor | None = None


PLAIN = Extras()


@dataclass(frozen=True, slots=True)
class ExtrasUsed:
    """Which of Extras a model has in any of its layers."""

    softcap: bool = False
    sinks: bool = False

    @classmethod
    def of(cls, extras: Extras) -> ExtrasUsed:
        return cls(extras.softcap > 0, extras.sinks is not None)

    def __bool__(self) -> bool:
        return self.softcap or self.sinks

    def __or__(self, other: ExtrasUsed) -> ExtrasUsed:
        return ExtrasUsed(self.softcap or other.softcap, self.sinks or other.sinks)

    def __str__(self) -> str:
        return " and ".join([*["a soft cap"] * self.softcap, *["sinks"] * self.sinks]) or "neither soft cap nor sinks"


NO_EXTRAS = ExtrasUsed()


class StepBatch(Protocol):
    """A backend's own view of one step: built once a step, used by every layer."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        extras: Extras = PLAIN,
    ) -> torch.Tensor:
        """query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim] -> [1, T, heads, head_dim].

        Of a latent group (a pool with one plane) `value` is not looked at: values are the first `rule.values` elements
        of the keys, and the answer is [1, T, heads, rule.values]. `layer` counts within the group.
        """
        ...


class WrittenBatch(StepBatch, Protocol):
    """A batch that lets others write keys and values: what computes them may do so in one go (engine/fused)."""

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pool, and block and slot of each new token [T]; block -1: nowhere."""
        ...

    def attend_written(self, layer: int, query: torch.Tensor, scaling: float, extras: Extras = PLAIN) -> torch.Tensor:
        """`attend`, where keys and values are in the pool already."""
        ...


class AttentionBackend(Protocol):
    name: str

    def prepare(self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL) -> StepBatch:
        """`kv` is the pool of a group [num_blocks, layers, 2, kv_heads, block_tokens, head_dim] (latent: 1 for 2),
        `chunks` have their tables of this group in `block_ids`, and `rule` says which tokens a token looks at.
        """
        ...


class Latent(Protocol):
    """What a module of latent attention has (engine/latent.py): what is kept is narrower than its heads' keys."""

    values: int

    def enter(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What came to attention -> query [1, heads, T, width] and key [1, 1, T, width] of a latent group."""
        ...

    def leave(self, answer: torch.Tensor) -> torch.Tensor:
        """[1, T, heads, values] -> [1, T, heads, value_dim], the module's own."""
        ...


class Probe:
    """Stands in for a step while a model is looked at (engine/model_probe.py); masks then say how they are made."""

    def see(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, extras: Extras
    ) -> torch.Tensor:
        """Returns the layer's answer [1, T, heads, value_dim]."""
        raise NotImplementedError

    def see_latent(self, layer: int, heads: int, width: int, values: int, mask: Any, extras: Extras) -> None:
        """Of a layer that keeps one vector of `width` a token; its first `values` elements are the value."""
        raise NotImplementedError


class _Here(threading.local):
    step: StepBatch | Probe | None = None


_here = _Here()


@contextmanager
def attending(step: StepBatch | Probe) -> Iterator[None]:
    """While it lasts, a model's attention in this thread is that of this step. Not told by an argument: the layers of
    some models keep from their attention what the model is called with.
    """
    _here.step = step
    try:
        yield
    finally:
        _here.step = None


def current_step() -> Any:
    step = _here.step
    assert step is not None, "attention outside of a step"
    return step


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Registered with transformers. Refuses what it would compute wrongly rather than compute it."""
    step: StepBatch | Probe = current_step()
    if isinstance(attention_mask, torch.Tensor):
        raise AttentionRefused(f"{type(module).__name__} makes an attention mask of its own")
    if not getattr(module, "is_causal", True):
        raise AttentionRefused(f"{type(module).__name__} is not causal: it looks at later tokens, as encoders do")
    if indices is not None:
        raise AttentionRefused(f"{type(module).__name__} picks the tokens that it looks at (sparse attention)")
    if isinstance(step, Probe):
        _check_known(module, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    extras = PLAIN if softcap is None and s_aux is None else Extras(softcap or 0.0, s_aux)
    latent: Latent | None = module.__dict__.get(LATENT)  # not by getattr, which is slow where there is none
    if latent is not None:
        query, key = latent.enter(query, key, value)
        if isinstance(step, Probe):
            _, heads, tokens, width = query.shape
            step.see_latent(module.layer_idx, heads, width, latent.values, attention_mask, extras)
            return latent.leave(query.new_zeros(1, tokens, heads, latent.values)), None
        return latent.leave(step.attend(module.layer_idx, query, key, key, scale, extras)), None
    if isinstance(step, Probe):
        return step.see(module.layer_idx, query, key, value, attention_mask, extras), None
    narrow = value.shape[-1]
    if narrow < query.shape[-1]:  # the pool has one width
        value = pad(value, (0, query.shape[-1] - narrow))
        return step.attend(module.layer_idx, query, key, value, scale, extras)[..., :narrow], None
    if narrow > query.shape[-1]:
        raise AttentionRefused(f"{type(module).__name__} has values wider than its keys")
    return step.attend(module.layer_idx, query, key, value, scale, extras), None


def _check_known(module: Any, others: dict[str, Any]) -> None:
    """What a module hands its attention besides: numbers would go into the scores, in a way of its own."""
    for name, value in others.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            raise AttentionRefused(f"{type(module).__name__} hands its attention {name}, which is not supported")


@dataclass(frozen=True, slots=True)
class MaskSeen:
    """In place of a mask, while a model is looked at: `allowed`(batch, head, query position, key position).

    Whoever computes with it computes attention by itself: any use but passing it on raises AttentionRefused.
    """

    allowed: Callable[..., Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttentionRefused(_OWN_CODE)

    def __getitem__(self, _: Any) -> Any:
        raise AttentionRefused(_OWN_CODE)

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise AttentionRefused(_OWN_CODE)


_OWN_CODE = "its attention is code of its own, which transformers has no other for"


_probing = False


@contextmanager
def probing() -> Iterator[None]:
    """While it lasts transformers' masks are MaskSeen; otherwise they are None, since backends make their own."""
    from transformers import masking_utils

    global _probing
    packed = masking_utils.find_packed_sequence_indices
    _probing = True
    # Of tensors without content it cannot tell, and takes any row for several sequences.
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        _probing = False
        masking_utils.find_packed_sequence_indices = packed


def _mask(*_: Any, mask_function: Callable[..., Any], **__: Any) -> MaskSeen | None:
    return MaskSeen(mask_function) if _probing else None


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask)
