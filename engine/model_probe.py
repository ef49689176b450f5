"""What a model's layers keep, seen rather than read: a few tokens go through it, and each attention says what it got.

Of a layer we see its heads and their size in the keys that come, its rule in the mask that transformers would have made
for it, and its state in what its mixer leaves in a cache (engine/recurrent.py). Layers with one rule and one shape
become a group (kv_transfer/layout.py). A layer that keeps nothing must be said to be such a one, and the trial at start
(engine/position_trial.py) sees whether it is.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from engine.attention.interface import (
    NO_EXTRAS,
    AttentionRefused,
    Extras,
    ExtrasUsed,
    MaskSeen,
    Probe,
    attending,
    probing,
)
from engine.model_errors import ModelLoadError, meant_for_people
from engine.recurrent import take_over
from kv_transfer.layout import FULL, Group, Rule

_TOKENS = 2
KEEPS_NOTHING = ("mlp", "moe")  # among the types of layers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerSeen:
    """`width`: elements of a key; a value is no wider. Of a state: bytes of a sequence's blob, of all layers."""

    layer: int
    heads: int
    kv_heads: int
    width: int
    rule: Rule
    extras: ExtrasUsed = NO_EXTRAS

    @property
    def kept(self) -> tuple[Rule, int, int]:
        """Layers that keep the same, in the same shape, are alike."""
        return self.rule, self.kv_heads, self.width


class _Notes(Probe):
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rules: dict[Any, Rule] = {}
        self.seen: list[LayerSeen] = []

    def see(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, extras: Extras
    ) -> torch.Tensor:
        if key.shape[2] != _TOKENS:
            raise AttentionRefused("its attention changes the number of tokens")
        heads, kv_heads, width = query.shape[1], key.shape[1], key.shape[3]
        self.seen.append(LayerSeen(layer, heads, kv_heads, width, self._rule(mask), ExtrasUsed.of(extras)))
        return query.new_zeros(1, _TOKENS, query.shape[1], value.shape[3])

    def see_latent(self, layer: int, heads: int, width: int, values: int, mask: Any, extras: Extras) -> None:
        base = self._rule(mask)
        rule = Rule(base.window, base.chunk, values)
        self.seen.append(LayerSeen(layer, heads, 1, width, rule, ExtrasUsed.of(extras)))

    def _rule(self, mask: Any) -> Rule:
        if not isinstance(mask, MaskSeen):
            return FULL
        if mask not in self._rules:
            self._rules[mask] = rule_of(mask.allowed, self._limit)
        return self._rules[mask]


def rule_of(allowed: Callable[..., Any], limit: int) -> Rule:
    """The rule behind one of transformers' mask functions, for positions below `limit`. Raises AttentionRefused."""
    with unset_fake_temporarily():
        return _rule_of(allowed, limit)


def _rule_of(allowed: Callable[..., Any], limit: int) -> Rule:
    keys = torch.arange(limit)
    zero = torch.tensor(0)

    def first(position: int) -> int:
        seen = torch.as_tensor(allowed(zero, zero, torch.tensor(position), keys[: position + 1])).expand(position + 1)
        start = position + 1 - int(seen.sum())
        if not bool(seen[start:].all()) or start > position:
            raise AttentionRefused("a token of it looks at keys that are not a piece that ends with itself")
        return start

    if first(limit - 1) == 0:
        return FULL
    low, high = 0, limit - 1  # first(low) == 0 < first(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if first(middle) else (middle, high)
    probes = {0, 1, high - 1, high, high + 1, 2 * high - 1, 2 * high, 3 * high + 1, limit // 2, limit - 2, limit - 1}
    for rule in (Rule(window=high), Rule(chunk=high)):
        if all(first(p) == rule.first(p) for p in probes if 0 <= p < limit):
            return rule
    raise AttentionRefused("its tokens look back by a rule that is neither a window nor a chunk")


def probe_layers(model: Any, device: torch.device, limit: int) -> list[LayerSeen]:
    """In order of layers. `limit`: positions that are served. Raises ModelLoadError for what cannot be served."""
    name = type(model).__name__
    notes = _Notes(limit)
    try:
        recurrence = take_over(model)
        _tell_layers(model)
        with contextlib.nullcontext() if recurrence is None else recurrence.probing():
            _run(model, device, notes)
    except AttentionRefused as error:
        raise ModelLoadError(f"{name} cannot be served: {error}; choose another model") from error
    except Exception as error:  # model code may fail in any way when its attention is not the one it knows
        log.debug("probing %s", name, exc_info=True)
        said = meant_for_people(error)
        how = f"on tokens alone{said}" if said else "with attention that is not its own"
        raise ModelLoadError(f"{name} cannot be served: its code does not run {how}; choose another model") from error
    states = (
        []
        if recurrence is None
        else [LayerSeen(layer, 0, 1, recurrence.width, Rule(state=True)) for layer in sorted(recurrence.layers)]
    )
    config = model.config.get_text_config()
    odd = _odd_layers(config, [seen.layer for seen in notes.seen], {seen.layer for seen in states})
    if odd:
        raise ModelLoadError(f"{name} cannot be served: {odd}; choose another model")
    if any(seen.rule.window == 1 for seen in notes.seen):  # its cache then drops the last none of the tokens: keeps all
        raise ModelLoadError(
            f"{name} cannot be served: it has a window of one token, with which transformers computes otherwise when "
            "it generates than when it does not; choose another model"
        )
    short = _shortest_memory(config, notes.seen, limit)
    if short is not None:
        raise ModelLoadError(
            f"{name} cannot be served beyond {short} tokens: transformers remembers no more of them when it generates, "
            f"and looks at all of them when it does not; set engine.context_limit_tokens to at most {short}"
        )
    return [*notes.seen, *states]


def attention_layers(model: Any, device: torch.device, limit: int) -> list[LayerSeen]:
    """Of a model in which nothing was changed: what its attention shows. Empty where it does not run with ours."""
    notes = _Notes(limit)
    try:
        _tell_layers(model)
        _run(model, device, notes)
    except Exception:  # `probe_layers` says why, if it has to
        return []
    return notes.seen


def _run(model: Any, device: torch.device, notes: _Notes) -> None:
    with torch.inference_mode(), probing(), attending(notes):
        model(
            input_ids=torch.zeros((1, _TOKENS), dtype=torch.long, device=device),
            position_ids=torch.arange(_TOKENS, device=device)[None],
            use_cache=False,
        )


def _tell_layers(model: Any) -> None:
    """Attention that several layers share hears in each call for which one it computes."""

    def hear(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = next(i for i, name in enumerate(inspect.signature(module.forward).parameters) if name == "layer_idx")
        module.layer_idx = kwargs["layer_idx"] if "layer_idx" in kwargs else args[place]

    for module in model.modules():
        shared = hasattr(module, "is_causal") and "layer_idx" in inspect.signature(module.forward).parameters
        if shared and not module._forward_pre_hooks:
            module.register_forward_pre_hook(hear, with_kwargs=True)


def _shortest_memory(config: Any, layers: Sequence[LayerSeen], limit: int) -> int | None:
    """The window of a layer in transformers' cache, where it is narrower than the layer's mask."""
    from transformers import DynamicCache

    try:
        kept = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    except Exception:  # a configuration that says nothing of windows, in one of many ways
        return None
    looked_at = {seen.layer: seen.rule.reach or limit for seen in layers}
    short = [n for i, n in enumerate(kept) if isinstance(n, int) and n < min(limit, looked_at.get(i, 0))]
    return min(short, default=None)


def _odd_layers(config: Any, attention: Sequence[int], states: set[int]) -> str:
    """Why not every layer that keeps something was seen, and its attention once; "" if so."""
    types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    keeping = {*attention, *states}
    if not keeping:
        return "none of its layers calls attention through transformers' interface, which is where ours would stand"
    twice = next((layer for layer in attention if attention.count(layer) > 1), None)
    if twice is not None:
        return f"a token passes the attention of layer {twice} more than once, so one place for its keys is not enough"
    expected = {layer for layer, kind in enumerate(types) if kind not in KEEPS_NOTHING}
    unseen = sorted(expected - keeping)
    if unseen:
        return f"layer {unseen[0]} has attention of its own, or keeps what transformers' cache does not show"
    more = sorted(keeping - set(range(config.num_hidden_layers))) or sorted(keeping - expected)
    return f"layer {more[0]} keeps something, and its configuration says that it does not" if more else ""


def groups_of(layers: Sequence[LayerSeen], dtype: str) -> tuple[Group, ...]:
    """The first is one that keeps everything, if there is any: its blocks stand for a sequence's length. States are
    last. Where there is nothing else, there is a group to count by.
    """
    kinds: dict[tuple[Rule, int, int], list[int]] = {}
    for seen in layers:
        kinds.setdefault(seen.kept, []).append(seen.layer)
    if all(seen.rule.state for seen in layers):  # two numbers a token, which nobody reads
        kinds[FULL, 1, 1] = [0]
    groups = [
        Group(rule, tuple(of), heads, width, "uint8" if rule.state else dtype)
        for (rule, heads, width), of in kinds.items()
    ]
    return tuple(sorted(groups, key=lambda g: (g.rule.state, g.rule.leaves, -len(g.layers))))
