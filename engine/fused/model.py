"""A decoder of the common shape over fused kernels: transformers' weights and modules, our order of calls.

    stream, delta     the residual stream and what the last block adds to it, joined by the next norm
    each layer        norm -> qkv product -> rotation, write into the pool -> attention -> product
                      norm -> gate-up product -> gated SiLU -> product        (or the layer's own MLP, as experts)

Called as transformers' own model is, so that engine/forward.py and CUDA graphs take either. What does not fit is named
by `obstacle`; what fits and computes something else is found by the trial (engine/position_trial.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import linear

from engine.attention.interface import StepBatch, current_step
from engine.fused import kernels
from engine.layer_taps import TapsItself, rows
from engine.merged_linear import MERGED

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMS = {"q_norm", "k_norm"}


def obstacle(model: Any, head_dim: int) -> str | None:
    """Why the model does not fit; None if it seems to."""
    inner, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    layers = getattr(inner, "layers", None)
    if inner is None or head is None or not layers or getattr(inner, "rotary_emb", None) is None:
        return "it is not built as model.model.layers with model.model.rotary_emb and model.lm_head"
    odd = {name for name, _ in inner.named_children()} - {"embed_tokens", "layers", "norm", "rotary_emb"}
    for layer in layers:
        odd |= {name for name, _ in layer.named_children()} ^ _LAYER
        attention = {name for name, _ in layer.self_attn.named_children()} if not odd else _ATTENTION
        odd |= attention - _ATTENTION - _NORMS | _ATTENTION - attention
        if odd:
            return f"its layers are of another kind ({min(odd)})"
        if len(attention & _NORMS) == 1 or any(
            tuple(getattr(layer.self_attn, name).weight.shape) != (head_dim,) for name in attention & _NORMS
        ):
            return "its norms of queries and keys are not per head"
        if not isinstance(layer.self_attn.q_proj, MERGED):
            return "its q, k and v projections are not merged"
        if any(_epsilon(norm) is None for norm in (layer.input_layernorm, layer.post_attention_layernorm)):
            return "its norms are no RMS norms"
    if _epsilon(inner.norm) is None:
        return "its last norm is no RMS norm"
    return "its head_dim is odd" if head_dim % 2 else None


def _epsilon(norm: Any) -> float | None:
    if getattr(norm, "bias", None) is not None or not hasattr(norm, "weight"):
        return None
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _is_gated_silu(mlp: Any, config: Any) -> bool:
    children = {name for name, _ in mlp.named_children()} - {"act_fn"}
    activation = getattr(config, "hidden_act", None) in ("silu", "swish")
    return activation and children == {"gate_proj", "up_proj", "down_proj"} and isinstance(mlp.gate_proj, MERGED)


@dataclass(frozen=True, slots=True)
class _Layer:
    module: Any
    norms: tuple[torch.Tensor, torch.Tensor] | None  # of query and key heads
    norm_epsilon: float
    gated: bool


class FusedModel(TapsItself):
    def __init__(self, model: Any, heads: int, kv_heads: int) -> None:
        inner, config = model.model, model.config.get_text_config()
        self._inner, self._head = inner, model.lm_head
        self._heads, self._kv_heads = heads, kv_heads
        self._layers = [self._of(layer, config) for layer in inner.layers]

    @staticmethod
    def _of(layer: Any, config: Any) -> _Layer:
        norm = getattr(layer.self_attn, "q_norm", None)
        norms = None if norm is None else (norm.weight, layer.self_attn.k_norm.weight)
        epsilon = 0.0 if norm is None else _epsilon(norm)
        return _Layer(layer, norms, epsilon or 0.0, _is_gated_silu(layer.mlp, config))

    def __call__(self, **arguments: Any) -> SimpleNamespace:
        return self.forward(**arguments)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """input_ids, position_ids [1, T]; logits_to_keep [n] -> `logits` [1, n, vocabulary]."""
        inner, step = self._inner, current_step()
        stream = inner.embed_tokens(input_ids)[0].contiguous()
        cos, sin = inner.rotary_emb(stream[None], position_ids)
        angles = cos[0].contiguous(), sin[0].contiguous()
        delta = None
        for index, layer in enumerate(self._layers):
            if self._taps is not None:
                stream, delta = self._tap(index, stream, delta), None
            attended = self._attend(index, layer, _normed(stream, delta, layer.module.input_layernorm), angles, step)
            delta = layer.module.self_attn.o_proj(attended)
            normed = _normed(stream, delta, layer.module.post_attention_layernorm)
            delta = self._mlp(layer, normed)
        if self._taps is not None:
            self._tap(len(self._layers), stream, delta)
        stream, delta = stream[logits_to_keep], delta[logits_to_keep] if delta is not None else None
        return SimpleNamespace(logits=self._head(_normed(stream, delta, inner.norm))[None])

    def _tap(self, index: int, stream: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
        assert self._taps is not None
        replaced, found = self._taps
        made = stream if delta is None else stream + delta
        if index:
            found.outputs[index - 1] = made
        else:
            found.inputs[0] = made
        if index not in replaced:
            return made
        given = rows(replaced[index]).to(stream)
        return torch.cat((given, made[len(given) :]))  # the packed row may be padded

    def _attend(
        self,
        index: int,
        layer: _Layer,
        normed: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        step: StepBatch,
    ) -> torch.Tensor:
        attention, heads, kv_heads = layer.module.self_attn, self._heads, self._kv_heads
        first: Any = attention.q_proj
        qkv = linear(normed, first.weight, first.bias)
        places = getattr(step, "places", None)
        into = None if places is None else (*places, index)
        query, key = kernels.rotate(qkv, heads, kv_heads, angles, layer.norms, layer.norm_epsilon, into)
        by_head = query.transpose(0, 1)[None]
        written: Any = step
        if key is None:
            attended = written.attend_written(index, by_head, attention.scaling)
        else:
            value = qkv.view(len(qkv), heads + 2 * kv_heads, -1)[:, heads + kv_heads :].transpose(0, 1)[None]
            attended = step.attend(index, by_head, key.transpose(0, 1)[None], value, attention.scaling)
        return attended.reshape(len(normed), -1)

    @staticmethod
    def _mlp(layer: _Layer, normed: torch.Tensor) -> torch.Tensor:
        mlp = layer.module.mlp
        if layer.gated:
            first: Any = mlp.gate_proj
            return mlp.down_proj(kernels.gate(linear(normed, first.weight, first.bias)))
        found = mlp(normed[None])
        return (found[0] if isinstance(found, tuple) else found).reshape(normed.shape).contiguous()


def _normed(stream: torch.Tensor, delta: torch.Tensor | None, norm: Any) -> torch.Tensor:
    return kernels.add_norm(stream, delta, norm.weight, _epsilon(norm) or 0.0)
