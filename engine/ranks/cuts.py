"""What of each parameter a rank keeps: read from transformers' plan for the family, and from the shapes.

1. The plan names linear layers as `colwise` (a rank keeps rows of the weight, and has a part of the answer) or
   `rowwise` (it keeps columns, sees a part of the input, and the ranks' answers are summed). What it gathers right
   behind a layer is kept whole here instead: every rank computes it.
2. Rows of attention are whole heads. Heads of keys and values that are fewer than ranks are kept by several.
3. Experts are cut by number, then by their inner width (engine/ranks/place.py).
4. A head of its own (`lm_head`) is cut by tokens of the vocabulary; one that is the embedding is kept whole, like the
   embedding.

What the plan says in other words, or where the shapes do not divide, is refused. So is every family that
tests/model/test_ranks.py has not compared with transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from engine.experts.parts import ExpertsModule, experts_of
from engine.ranks.place import CannotSplit, Place

_ATTENTION = {
    **{f"layers.*.self_attn.{name}_proj": "colwise" for name in ("q", "k", "v")},
    "layers.*.self_attn.o_proj": "rowwise",
}
_LATENT = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
# Where transformers' plan says nothing of the attention, or there is none.
_OURS: dict[str, dict[str, str]] = {
    "gpt_oss": {**_ATTENTION, "layers.*.self_attn.sinks": "colwise"},
    "deepseek_v3": _LATENT,
}
_WHOLE = {
    *("mla_kv_a_proj", "replicated_with_grad_allreduce", "replicate", "colwise_gather_output", "rowwise_split_input"),
    *("moe_tp_experts", "local_params"),
}
# Compared with transformers, token by token, by tests/model/test_ranks.py.
FAMILIES = frozenset({"llama", "qwen3", "mixtral", "gemma2", "gpt_oss", "deepseek_v3"})

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """Of each dimension the ranges that are kept, one after the other; dimensions that are not named are whole."""

    ranges: Mapping[int, Ranges]

    def shape(self, of: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            sum(end - start for start, end in self.ranges[dim]) if dim in self.ranges else size
            for dim, size in enumerate(of)
        )


@dataclass(frozen=True, slots=True)
class ExpertsCut:
    """`inner`: of the width inside each expert, what is kept."""

    first: int
    end: int
    count: int
    inner: tuple[int, int]
    width: int


@dataclass(slots=True)
class Cuts:
    """`summed`: linear layers whose answers are a part of a sum; `kv_heads`: of the whole model, by layer, where they
    are cut; `attributes`: what modules are told of their size; `head`: the name of the head and its tokens.
    """

    parameters: dict[str, Cut] = field(default_factory=dict[str, Cut])
    summed: list[str] = field(default_factory=list[str])
    experts: dict[str, ExpertsCut] = field(default_factory=dict[str, ExpertsCut])
    kv_heads: dict[int, int] = field(default_factory=dict[int, int])
    attributes: list[tuple[str, str, int]] = field(default_factory=list[tuple[str, str, int]])

    def columns(self) -> dict[str, Ranges]:
        """Of weights whose columns are cut, by parameter, those that are kept."""
        layers = {n: cut.ranges[1] for n, cut in self.parameters.items() if n.endswith(".weight") and 1 in cut.ranges}
        inner = {f"{p}.down_proj": (cut.inner,) for p, cut in self.experts.items() if cut.inner != (0, cut.width)}
        return layers | inner


def cuts_of(model: Any, place: Place) -> Cuts:
    """`model`: whole, without its weights. Raises CannotSplit."""
    config = model.config.get_text_config()
    kind = config.model_type
    if kind not in FAMILIES:
        raise CannotSplit("its family has not been compared with transformers on several ranks")
    plan = dict(getattr(type(config), "base_model_tp_plan", None) or {}) | _OURS.get(kind, {})
    if not plan:
        raise CannotSplit("transformers has no plan for it")
    cuts = Cuts()
    prefix = f"{model.base_model_prefix}."
    experts = {id(e.module): e for e in experts_of(model)}
    for path, module in model.named_modules():
        found = experts.get(id(module))
        if found is not None:
            _cut_experts(cuts, path, found, place)
    inside = tuple(f"{path}." for path in cuts.experts)
    for path, style in _planned(model, plan, prefix):
        if style in _WHOLE or path in cuts.experts or path.startswith(inside):
            continue
        _cut_planned(cuts, model, path, style, place, config.num_attention_heads)
    head = getattr(model, "lm_head", None)
    if type(head) is nn.Linear and not config.tie_word_embeddings:
        _rows(cuts, "lm_head", head, (place.columns(head.out_features),))
    return cuts


def _planned(model: Any, plan: Mapping[str, str], prefix: str) -> Iterator[tuple[str, str]]:
    """Modules and parameters that the plan names, with its word for them."""
    patterns = [(re.compile(re.escape(key).replace(r"\*", r"\d+")), style) for key, style in plan.items()]
    names = [path for path, _ in model.named_modules()]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in names]
    for name in names:
        for pattern, style in patterns:
            if pattern.fullmatch(name.removeprefix(prefix)):
                yield name, style


def _cut_planned(cuts: Cuts, model: Any, path: str, style: str, place: Place, heads: int) -> None:
    if style not in ("colwise", "rowwise"):
        raise CannotSplit(f"transformers' plan says {style} of {path}, which is not known here")
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    thing: Any = getattr(parent, name)
    if isinstance(thing, nn.Parameter):
        if style != "colwise" or not hasattr(parent, "o_proj") or thing.shape != (heads,):
            raise CannotSplit(f"{path} is no number for each head")
        cuts.parameters[path] = Cut({0: (place.heads(heads),)})
        return
    if type(thing) is not nn.Linear:
        raise CannotSplit(f"{path} is no plain linear layer")
    of_attention = hasattr(parent, "o_proj")
    if style == "rowwise":
        width = thing.in_features
        start, end = _of_heads(width, heads, place) if of_attention else place.columns(width)
        cuts.parameters[f"{path}.weight"] = Cut({1: ((start, end),)})
        cuts.summed.append(path)
        if of_attention:
            _tell(cuts, parent_path, parent, place, heads)
        return
    rows = thing.out_features
    if not of_attention:
        kept = place.columns(rows)
    elif name in ("k_proj", "v_proj"):
        width = parent.head_dim
        if rows % width:
            raise CannotSplit(f"{path} has {rows} rows, no multiple of a head's {width}")
        first, last = place.kv_heads(rows // width)
        kept = (first * width, last * width)
        if name == "k_proj":
            cuts.kv_heads[parent.layer_idx] = rows // width
    else:
        kept = _of_heads(rows, heads, place)
    _rows(cuts, path, thing, (kept,))


def _of_heads(rows: int, heads: int, place: Place) -> tuple[int, int]:
    first, end = place.heads(heads)
    if rows % heads:
        raise CannotSplit(f"a layer of its attention is {rows} wide, no multiple of {heads} heads")
    return first * rows // heads, end * rows // heads


def _rows(cuts: Cuts, path: str, linear: nn.Linear, kept: Ranges) -> None:
    cuts.parameters[f"{path}.weight"] = Cut({0: kept})
    if linear.bias is not None:
        cuts.parameters[f"{path}.bias"] = Cut({0: kept})


def _tell(cuts: Cuts, path: str, attention: Any, place: Place, heads: int) -> None:
    """How many heads are here."""
    first, end = place.heads(heads)
    projection = getattr(attention, "k_proj", None)
    whole = projection.out_features // attention.head_dim if projection is not None else heads
    low, high = place.kv_heads(whole)
    told = {
        "num_key_value_groups": (end - first) // (high - low),
        "num_key_value_heads": high - low,
        **dict.fromkeys(("num_heads", "num_attention_heads", "n_heads"), end - first),
    }
    cuts.attributes += [(path, name, value) for name, value in told.items() if hasattr(attention, name)]


def _cut_experts(cuts: Cuts, path: str, experts: ExpertsModule, place: Place) -> None:
    if experts.dense:
        raise CannotSplit(f"{path} is given every row for every expert")
    if experts.has_norm and place.ranks_an_expert > 1:
        raise CannotSplit(f"{path} has a norm behind each expert; set engine.expert_parallel to {place.degree}")
    first, end = place.experts(experts.count)
    down_inner = 1 if experts.transposed else 2
    width = experts.down.shape[down_inner]
    low, high = place.inner(width)
    if not experts.gated:
        inner: Ranges = ((low, high),)
    elif experts.interleaved:
        inner = ((2 * low, 2 * high),)
    else:
        inner = ((low, high), (width + low, width + high))
    own = ((first, end),)
    up = "gate_up_proj" if experts.gated else "up_proj"
    cuts.parameters[f"{path}.{up}"] = Cut({0: own, 2 if experts.transposed else 1: inner})
    cuts.parameters[f"{path}.down_proj"] = Cut({0: own, down_inner: ((low, high),)})
    if experts.up_bias is not None:
        cuts.parameters[f"{path}.{up}_bias"] = Cut({0: own, 1: inner})
    if experts.down_bias is not None:
        cuts.parameters[f"{path}.down_proj_bias"] = Cut({0: own})
    cuts.experts[path] = ExpertsCut(first, end, experts.count, (low, high), width)
    if hasattr(experts.module, "num_experts"):
        cuts.attributes.append((path, "num_experts", end - first))
