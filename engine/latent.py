"""Latent attention (MLA): what is kept is what all heads share, one vector a token, and never the heads' own keys.

    kept            [ latent after its norm | rotary part ]
    key of a head   [ K latent | rotary part ]        its value   V latent        K, V: the head's rows of kv_b_proj
    so              query . key = [ Kt q_nope | q_rotary ] . kept,      sum of w value = V (sum of w latent)

transformers' modules compress the hidden states, expand them in a method of their own (`expand_kv`), and attend. We
stand in both places: `expand_kv` hands out what is kept, and around the attention, queries and answers are multiplied
by the heads' weights (interface.paged_attention). All else is the module's own code: projections, norms, rotary
embeddings, scales, gates.

1. `serve_latent` takes a module over if its parts have the shapes above, and if its `expand_kv`, tried on numbers,
   computes them. Other latent attention is refused.
2. In each step the keys that reach the attention must be the ones handed out: who changes them is refused.
3. Where an indexer picks the tokens that are looked at (sparse attention), it picks all as long as they are no more
   than its `index_topk`: up to that limit the model is served, without the indexer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from engine.attention.interface import LATENT, AttentionRefused, MaskSeen
from engine.model_errors import ModelLoadError

_ANOTHER = "choose another model"
Times = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # [1, heads, rows, n], [heads, n, m]
_NEAR = 5e-2  # of the largest element: bfloat16 is nearer, another order of rows is not


class LatentHeads:
    """Of one module: between what its heads see and what is kept (interface.Latent)."""

    def __init__(self, module: Any) -> None:
        """Raises AttentionRefused for a module that is not what it seems."""
        projection = module.kv_b_proj
        self.values: int = module.kv_lora_rank
        self._nope: int = module.qk_nope_head_dim
        self._rotary: int = module.qk_rope_head_dim
        per_head = self._nope + module.v_head_dim
        weight = projection.weight
        if type(projection) is not nn.Linear or projection.bias is not None or not weight.is_floating_point():
            raise AttentionRefused("its kv_b_proj is no plain linear layer")
        if weight.shape[1] != self.values or weight.shape[0] % per_head:
            raise AttentionRefused(f"its kv_b_proj has the shape {list(weight.shape)}")
        by_head = weight.detach().view(-1, per_head, self.values)
        self._keys = by_head[:, : self._nope]  # [heads, nope, values]; a view, like the next
        self._values = by_head[:, self._nope :].transpose(1, 2)  # [heads, values, v_head_dim]
        self._kept: torch.Tensor | None = None
        self._times: Times = torch.matmul
        self._try(module)

    def expand_kv(self, latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of the module's: nothing is expanded."""
        self._kept = torch.cat((latent, rotary), dim=-1)
        return self._kept, self._kept

    def enter(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept, self._kept = self._kept, None
        if kept is None or key is not kept or value is not kept:
            raise AttentionRefused("latent attention that changes keys or values after they are expanded")
        nope, rotary = query.split((self._nope, self._rotary), dim=-1)
        return torch.cat((self._times(nope, self._keys), rotary), dim=-1), kept

    def leave(self, answer: torch.Tensor) -> torch.Tensor:
        return self._times(answer.transpose(1, 2), self._values).transpose(1, 2)

    @property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries and answers are multiplied by, each [heads, n, m]."""
        return self._keys, self._values

    def multiply_by(self, times: Times) -> None:
        """In place of torch's product."""
        self._times = times

    def _try(self, module: Any) -> None:
        """Whether the module's own expansion is the one above. Of tensors without content only shapes are seen."""
        weight = module.kv_b_proj.weight
        generator = torch.Generator().manual_seed(0)
        latent, rotary = (
            torch.randn(1, 1, 2, size, generator=generator).to(weight.device, weight.dtype)
            for size in (self.values, self._rotary)
        )
        with torch.inference_mode():
            found = module.expand_kv(latent, rotary)
            keys = torch.cat((latent @ self._keys.transpose(1, 2), rotary.expand(-1, len(self._keys), -1, -1)), dim=-1)
            for ours, theirs in zip((keys, latent @ self._values), found, strict=True):
                if ours.shape != theirs.shape:
                    raise AttentionRefused(f"its expand_kv answers in the shape {list(theirs.shape)}")
                if isinstance(weight, FakeTensor):
                    continue
                if not (ours - theirs).abs().max() <= _NEAR * theirs.abs().max():
                    raise AttentionRefused("its expand_kv computes something else")


def serve_latent(model: Any, limit: int) -> int:
    """Takes over all latent attention of `model`, once its weights lie where they stay; returns of how many modules.
    `limit`: the context that is served. Raises ModelLoadError for what would be computed wrongly.
    """
    found = [m for m in model.modules() if hasattr(m, "kv_b_proj") or hasattr(m, "kv_a_proj_with_mqa")]
    if not found and getattr(model.config.get_text_config(), "kv_lora_rank", None) is not None:
        raise ModelLoadError(f"{type(model).__name__} has latent attention of a form that is not known; {_ANOTHER}")
    _serve_without_indexers(model, found, limit)
    for module in found:
        try:
            heads = LatentHeads(module)
        except (AttentionRefused, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ModelLoadError(
                f"{type(model).__name__} has latent attention of a form that is not known ({type(module).__name__}: "
                f"{error}); {_ANOTHER}"
            ) from None
        module.expand_kv = heads.expand_kv
        setattr(module, LATENT, heads)
    return len(found)


class _EveryToken(nn.Module):
    """In place of an indexer: no choice, which paged_attention takes for all tokens."""

    def forward(self, *_: Any, **__: Any) -> None:
        return None


class _NoMask:
    """Modules slice the mask for their indexer, also where there is none."""

    def __getitem__(self, _: Any) -> None:
        return None


class _MaskForIndexer(MaskSeen):
    def __getitem__(self, _: Any) -> None:
        return None


def _serve_without_indexers(model: Any, latent: list[Any], limit: int) -> None:
    sparse = [module for module in model.modules() if hasattr(module, "indexer")]
    if not sparse:
        return
    counts = [getattr(module.indexer, "index_topk", 0) for module in sparse if module.indexer is not None]
    name = type(model).__name__
    if not counts or not min(counts) or any(module not in latent for module in sparse):
        raise ModelLoadError(
            f"{name} picks the tokens that it looks at (sparse attention) in a way that is not known; {_ANOTHER}"
        )
    if limit > min(counts):
        raise ModelLoadError(
            f"{name} looks at {min(counts)} tokens that it picks (sparse attention), which is not supported where "
            f"there are more; set engine.context_limit_tokens to at most {min(counts)}"
        )
    for module in sparse:
        module.indexer = _EveryToken()
        module.register_forward_pre_hook(_with_mask, with_kwargs=True)


def _with_mask(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = kwargs.get("attention_mask")
    kwargs["attention_mask"] = _MaskForIndexer(mask.allowed) if isinstance(mask, MaskSeen) else _NoMask()
    return args, kwargs
