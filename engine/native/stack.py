"""A transformers model as one native call a step, where its parts are those of a Llama-shaped decoder.

1. `obstacle_to_stack` looks at the model's modules and parameter names: pre-norm layers of RMS norm, q, k, v and o
   projections (biases and per-head norms allowed), gated SiLU, rotary embedding over halves. Anything else is named.
2. `NativeStack` packs the weights.
3. The trial at start (engine/position_trial.py) compares its logits: a model that looks alike and computes something
   else (scaled residuals, another norm) is found there, and stays with transformers.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from engine.attention.interface import Chunk
from engine.forward import Arriving
from engine.kv_shape import KvPool
from engine.layer_taps import Tapped, TapsItself, rows
from engine.merged_linear import MERGED
from engine.native.library import DTYPES, CLayer, CModel, Library
from engine.native.quantized import Scaled, joined, pack_in_turn, room_of
from engine.native.step import NativeStep
from engine.quantization import quantized
from kv_transfer.layout import FULL, Rounding

PHASES = ("norm", "qkv", "rotary", "attention", "out", "gate_up", "down", "head")  # stack.cpp: Phase

_ROOM_BYTES = 256 << 20  # taken from the operating system only as far as it is written

_LAYER_WEIGHTS = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}
_LAYER_EXTRAS = {
    *(f"self_attn.{name}_proj.bias" for name in "qkvo"),
    *(f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")),
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
}
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}  # one angle a position, whatever the sequence's length
_FIRST_POSITIONS = 8192  # rows of the rotary tables at start; they grow with what is served
_PIECE_POSITIONS = 16384  # computed at once: what transformers allocates on the way is as long


def obstacle_to_stack(model: Any) -> str | None:
    """Why the model does not fit; None if it seems to."""
    inner, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    layers = getattr(inner, "layers", None)
    if inner is None or head is None or not layers:
        return "it is not built as model.model.layers and model.lm_head"
    config = model.config.get_text_config()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    outside = {name for name in parameters if not name.startswith("model.layers.")}
    odd = outside - {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for index in range(len(layers)):
        own = {name.removeprefix(f"model.layers.{index}.") for name in parameters if f"layers.{index}." in name}
        odd |= own - _LAYER_WEIGHTS - _LAYER_EXTRAS
        if missing := _LAYER_WEIGHTS - own:
            return f"layer {index} has no {min(missing)}"
        for names in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            if len({f"{name}_proj.bias" in own for name in names}) == 2:
                return f"layer {index} has biases for some of {', '.join(names)}"
    if odd:
        return f"it has {min(odd)}"
    if any(True for _ in model.named_buffers() if "rotary" not in _[0]):
        return "it has buffers besides the rotary embedding's"
    if head.weight.shape != inner.embed_tokens.weight.shape:
        return f"its head has {len(head.weight)} rows and its embedding {len(inner.embed_tokens.weight)}"
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        return f"its weights are {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}"
    activation = getattr(config, "hidden_act", None)
    if activation not in ("silu", "swish"):
        return f"its activation is {activation}"
    rope = getattr(inner, "rotary_emb", None)
    kind = getattr(rope, "rope_type", "default")
    if rope is None or kind not in _FIXED_ROPE:
        return f"its rotary embedding is of type {kind}"
    return None


class NativeStack(TapsItself):
    """A Forward. Holds packed copies of the weights: `model` may lose its layers afterwards."""

    def __init__(
        self, library: Library, model: Any, head_dim: int, kv_heads: int, limit: int, rounding: Rounding = ""
    ) -> None:
        self._library = library
        self._rounding: Rounding = rounding
        self.name = f"native stack ({library.isa})" + (f", KV in {rounding}" if rounding else "")
        self.cpus = library.cpus
        self.seconds: np.ndarray | None = None  # [len(PHASES)] float64: set it, and each step adds what its phases took
        self._held: list[torch.Tensor] = []  # everything that the C side points to
        self.kept: set[str] = set()  # paths of the layers whose small numbers are kept
        self._small = quantized(model)
        inner, config = model.model, model.config.get_text_config()
        attention = inner.layers[0].self_attn
        c = self._model = CModel()
        c.is_bf16 = inner.embed_tokens.weight.dtype == torch.bfloat16
        c.vocabulary, c.hidden = inner.embed_tokens.weight.shape
        c.heads, c.kv_heads, c.head_dim = config.num_attention_heads, kv_heads, head_dim
        c.intermediate, c.num_layers = config.intermediate_size, len(inner.layers)
        c.epsilon = _epsilon(inner.norm)
        c.scale = getattr(attention, "scaling", head_dim**-0.5)
        self._rope, self.limit = inner.rotary_emb, limit
        self._tables = _angles(self._rope, 0, 1)
        c.rotary = self._tables[0].shape[1] * 2
        self._reach(min(limit, _FIRST_POSITIONS))
        c.final_norm = self._floats(inner.norm.weight)
        self._room = torch.empty(0, dtype=torch.uint8)
        c.head, c.head_bits = self._packed([model.lm_head.weight], ["lm_head"])
        c.embedding = self._hold(inner.embed_tokens.weight.detach())
        self._layers = (CLayer * len(inner.layers))()
        for index, (to, layer) in enumerate(zip(self._layers, inner.layers, strict=True)):
            self._pack_layer(to, layer, f"model.layers.{index}")
        c.layers = ctypes.addressof(self._layers)
        self._small = None  # the packed copies have the scales

    @property
    def held_bytes(self) -> int:
        """Of weights, packed, and the embedding."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._held)

    def forward(
        self,
        kv: KvPool,
        token_ids: Sequence[int],
        positions: Sequence[int],
        chunks: list[Chunk],
        keep: Sequence[int],
        arriving: Arriving | None = None,
    ) -> torch.Tensor:
        """As Forward says; logits are float32."""
        assert arriving is None, "the host knows every token on CPU"
        assert isinstance(kv, torch.Tensor), "the stack is of models with a plain pool"
        self._reach(max(chunk.start + chunk.num_tokens for chunk in chunks))
        step = NativeStep(kv, chunks, FULL, self._rounding)
        logits = step.ask(token_ids, positions, keep, self._model.vocabulary)
        if self.seconds is not None:
            step.c.seconds = self.seconds.ctypes.data
        if self._taps is not None:
            return self._forward_tapped(step, logits, *self._taps)
        self._library.forward(self._model, step.c)
        return logits

    def _forward_tapped(
        self, step: NativeStep, logits: torch.Tensor, replaced: Mapping[int, torch.Tensor], found: Tapped
    ) -> torch.Tensor:
        made = step.tap(torch.stack([rows(replaced[layer]) for layer in range(self._model.num_layers)]))
        self._library.forward(self._model, step.c)
        found.inputs[0], *outputs = made.clone()
        found.outputs.update(enumerate(outputs))
        return logits

    def _reach(self, positions: int) -> None:
        """The kernels read the row of each position: there must be one. Tables double, up to the context limit."""
        have = len(self._tables[0])
        if positions <= have:
            return
        assert positions <= self.limit, "a position beyond the context limit"
        want = min(self.limit, max(positions, 2 * have))
        grown = [torch.empty((want, table.shape[1])) for table in self._tables]
        for to, table in zip(grown, self._tables, strict=True):
            to[:have] = table
        for start in range(have, want, _PIECE_POSITIONS):
            end = min(want, start + _PIECE_POSITIONS)
            for to, piece in zip(grown, _angles(self._rope, start, end), strict=True):
                to[start:end] = piece
        self._tables = (grown[0], grown[1])
        self._model.cos, self._model.sin = (table.data_ptr() for table in self._tables)

    @contextlib.contextmanager
    def only_positions(self, spans: Sequence[tuple[int, int]]) -> Iterator[None]:
        """For a trial: rows of the rotary tables for these positions alone. Memory is taken where it is written."""
        before, end = self._tables, max(end for _, end in spans)
        self._tables = tuple(torch.empty((end, table.shape[1])) for table in before)  # type: ignore[assignment]
        for first, last in spans:
            for to, piece in zip(self._tables, _angles(self._rope, first, last), strict=True):
                to[first:last] = piece
        self._model.cos, self._model.sin = (table.data_ptr() for table in self._tables)
        try:
            yield
        finally:
            self._tables = before
            self._model.cos, self._model.sin = (table.data_ptr() for table in before)

    def _hold(self, tensor: torch.Tensor) -> int:
        self._held.append(tensor)
        return tensor.data_ptr()

    def _floats(self, tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else self._hold(tensor.detach().float().contiguous())

    def _bias(self, tensors: list[torch.Tensor | None]) -> int | None:
        """Biases one after the other, with room for a whole last panel."""
        if all(t is None for t in tensors):
            return None
        joined = torch.cat([t.detach().float() for t in tensors if t is not None])
        return self._hold(torch.nn.functional.pad(joined, (0, -len(joined) % 32)))

    def _packed(self, weights: list[torch.Tensor], paths: list[str], *, join: bool = False) -> tuple[int, int]:
        """Where the packed weights of these layers lie, and how they are kept: one after the other in large pieces of
        memory, in the order in which a step reads them. Most are smaller than a large page. `join`: as one weight, or
        else a panel of each in turn.
        """
        alike = None if self._small is None else self._small.alike(paths)
        if alike is None:
            whole = [torch.cat(weights)] if join else weights
            place = self._place(sum(self._library.packed_bytes(weight) for weight in whole))
            self._library.pack(whole, place)
            return self._hold(place), 0
        self.kept.update(paths)
        each: list[Scaled] = list(zip(weights, alike.scales, strict=True))
        each = [joined(*each)] if join else each
        room = room_of(alike.bits, *each)
        size = math.prod(room)
        place = self._place(-(-size // 4096) * 4096)
        pack_in_turn(alike.bits, place[:size].view(room), *each)
        return self._hold(place), alike.bits

    def _place(self, size: int) -> torch.Tensor:
        if size > len(self._room):
            self._room = torch.empty(max(size, _ROOM_BYTES), dtype=torch.uint8)
            self._library.large_pages(self._room)
        place, self._room = self._room[:size], self._room[size:]
        return place

    def _pack_layer(self, to: CLayer, layer: Any, path: str) -> None:
        attention, mlp, pack = layer.self_attn, layer.mlp, self._packed
        q, k, v = (_linear(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        gate, up = _linear(mlp.gate_proj), _linear(mlp.up_proj)

        def paths(part: str, *names: str) -> list[str]:
            return [f"{path}.{part}.{name}_proj" for name in names]

        to.input_norm = self._floats(layer.input_layernorm.weight)
        to.post_norm = self._floats(layer.post_attention_layernorm.weight)
        to.q_norm = self._floats(getattr(getattr(attention, "q_norm", None), "weight", None))
        to.k_norm = self._floats(getattr(getattr(attention, "k_norm", None), "weight", None))
        to.qkv, to.qkv_bits = pack([q[0], k[0], v[0]], paths("self_attn", *"qkv"), join=True)
        to.qkv_bias = self._bias([q[1], k[1], v[1]])
        to.out, to.out_bits = pack([attention.o_proj.weight], paths("self_attn", "o"))
        to.out_bias = self._bias([attention.o_proj.bias])
        to.gate_up, to.gate_up_bits = pack([gate[0], up[0]], paths("mlp", "gate", "up"))
        to.gate_up_bias = self._bias_in_turn(gate[1], up[1])
        to.down, to.down_bits = pack([mlp.down_proj.weight], paths("mlp", "down"))
        to.down_bias = self._bias([mlp.down_proj.bias])

    def _bias_in_turn(self, first: torch.Tensor | None, second: torch.Tensor | None) -> int | None:
        if first is None or second is None:
            return None
        size = -(-len(first) // 32) * 32
        both = [torch.nn.functional.pad(b.detach().float(), (0, size - len(b))).view(-1, 32) for b in (first, second)]
        return self._hold(torch.stack(both, dim=1).contiguous())


def _linear(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A projection's own rows, also where it is the first of a merged group and its weight is all of theirs."""
    rows = getattr(layer, "own_rows", None) if isinstance(layer, MERGED) else None
    weight, bias = layer.weight.detach(), layer.bias
    return (weight, bias) if rows is None else (weight[:rows], None if bias is None else bias[:rows])


def _epsilon(norm: Any) -> float:
    found = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if found is None else found)


def _angles(rope: Any, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [end - start, rotary / 2] float32. The halves of transformers' tables are equal."""
    with torch.inference_mode():
        cos, sin = rope(torch.zeros(1, dtype=torch.float32), torch.arange(start, end)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
