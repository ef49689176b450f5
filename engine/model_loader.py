"""Reads a checkpoint that engine/model_check.py has found in order, and compares again what was loaded."""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from checkpoint.identity import model_identity
from engine.attention.interface import ATTENTION_NAME, NO_EXTRAS, AttentionRefused, ExtrasUsed
from engine.experts.choose import PLAIN
from engine.kv_rounding import rounded_groups, rounded_identity
from engine.latent import serve_latent
from engine.load_progress import weights_told
from engine.longrope import choose_by_row, original_context
from engine.merged_linear import merge_projections
from engine.model_check import Checked, check_loading, check_model, one_sentence, quietly
from engine.model_errors import ModelLoadError, meant_for_people
from engine.model_probe import LayerSeen, attention_layers, groups_of, probe_layers
from engine.position_trial import NoReference, Reference, take_reference
from engine.quantization import Scheme, check_parts, quantize
from engine.ranks.joined import Ranks, join_ranks
from engine.ranks.place import CannotSplit
from engine.ranks.weights import Part, part_of_model
from engine.stored_numbers import Grid, Stored, note, scales_of
from engine.text_part import drop_other_parts, text_section
from engine.unpack import UnpackedWeight, identity_of
from kv_transfer.layout import Group, Rounding
from kv_transfer.shards import part_of
from settings.model_path import model_name
from settings.phases import phase, progress

log = logging.getLogger(__name__)

__all__ = ["ModelFacts", "ModelLoadError", "Trial", "facts_of", "load_model", "prepare"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rest of the engine needs to know of a model. `identity` is equal for equal checkpoints that are
    quantized alike. `unquantized` is equal for equal checkpoints, however their weights are quantized here.
    """

    name: str
    identity: str
    num_layers: int
    groups: tuple[Group, ...]
    heads: int  # of queries, the most of any layer
    vocab_size: int
    context_limit_tokens: int
    dtype: str
    extras: ExtrasUsed = NO_EXTRAS
    own_groups: tuple[Group, ...] = ()  # of a rank that has a part: what its memory holds
    original_context_tokens: int = 0  # beyond, a sequence is computed again (engine/longrope.py); 0: never
    weights: str = ""  # how they are quantized: "int8 mlp"; empty: not at all
    unquantized: str = ""

    @property
    def scheme(self) -> str:
        """For people: of weights and KV, "int8 mlp kv int8"."""
        kept = next((group.rounding for group in self.groups if group.rounding), "")
        return " ".join(filter(None, (self.weights, kept and f"kv {kept}")))


def load_model(
    model: str,
    dtype: str,
    device: torch.device,
    context_limit_tokens: int | None,
    ranks: Ranks | None = None,
    scheme: Scheme | None = None,
    rounding: Rounding = "",
) -> tuple[Any, ModelFacts, Trial]:
    """Returns the model in eval mode on `device`, its facts, and what it computes by itself. Raises ModelLoadError.

    With `ranks` it is this rank's part of the model; its facts are of the whole, but for the groups of its memory.
    """
    checked = check_model(model, dtype, context_limit_tokens)
    with one_sentence(checked.directory), ThreadPoolExecutor(1, thread_name_prefix="identity") as beside:
        identity = beside.submit(model_identity, checked.described, checked.weights.files)
        part = None if ranks is None else _part(checked, ranks)
        loaded, grids = _with_weights(checked, part)
        loaded = loaded.to(device).eval().requires_grad_(False)
        if ranks is not None and part is not None:
            join_ranks(loaded, part.cuts, ranks)
        if scheme is not None:
            phase("quantizing the weights")
            if part is not None:
                check_parts(loaded, scheme, part.cuts.columns())
            quantize(loaded, scheme)
        if checked.packed:
            ours = (checked.names[name] for name in checked.packed if name in checked.names)  # of no other part
            names = frozenset(name.removesuffix(".weight") for name in ours)
            note(loaded, Stored(checked.packed_words, names), grids)
        phase("trying the model")
        name, limit = model_name(model), checked.context_limit_tokens
        trial, layers = prepare(loaded, text_section(checked.described), checked.dtype, limit, rounding)
        original = trial.reference.original
        if not identity.done():
            phase("hashing the weights")
        facts = facts_of(checked.config, name, identity.result(), checked.dtype, limit, layers, original)
        facts = replace(facts, groups=rounded_groups(loaded, facts.groups, rounding))
        if ranks is not None and part is not None:
            facts = _of_the_whole(facts, part, ranks)
        if checked.packed:
            facts = replace(facts, identity=identity_of(facts.identity))
        facts = replace(facts, unquantized=rounded_identity(facts.identity, rounding))
        if scheme is not None:
            facts = replace(facts, identity=scheme.identity(facts.identity), weights=str(scheme))
        facts = replace(facts, identity=rounded_identity(facts.identity, rounding))
    return loaded, facts, trial


@dataclass(frozen=True, slots=True)
class Trial:
    """What every path that may serve the model is held against (engine/position_trial.py)."""

    reference: Reference
    described: Mapping[str, Any]


def prepare(
    model: Any, described: Mapping[str, Any], dtype: torch.dtype, limit: int, rounding: Rounding = ""
) -> tuple[Trial, list[LayerSeen]]:
    """Looks at a model as transformers has it, then makes it ours. Raises ModelLoadError."""
    device = model.get_input_embeddings().weight.device
    trial = take_trial(model, described, dtype, limit, rounding)
    if trial.reference.original:
        choose_by_row(model, trial.reference.original)
    serve_latent(model, limit)
    merge_projections(model)
    return trial, probe_layers(model, device, limit)


def take_trial(
    model: Any, described: Mapping[str, Any], dtype: torch.dtype, limit: int, rounding: Rounding = ""
) -> Trial:
    """Of a model as transformers has it. Raises ModelLoadError."""
    device = model.get_input_embeddings().weight.device
    layers, original = attention_layers(model, device, limit), original_context(model, limit)
    try:
        reference = take_reference(model, described, dtype, limit, layers, original, rounding)
    except NoReference as error:
        try:
            probe_layers(model, device, limit)  # which may know more of it
        except ModelLoadError as known:
            cause = known.__cause__
            if cause is None or isinstance(cause, AttentionRefused) or meant_for_people(cause):
                raise
        raise ModelLoadError(
            f"{type(model).__name__} cannot be served: {error}, so nothing says what is right; choose another model"
        ) from error
    return Trial(reference, described)


def facts_of(
    config: Any,
    name: str,
    identity: str,
    dtype: torch.dtype,
    limit: int,
    layers: Sequence[LayerSeen],
    original: int = 0,
) -> ModelFacts:
    text = config.get_text_config()
    kv_dtype = str(dtype).removeprefix("torch.")
    return ModelFacts(
        name=name,
        identity=identity,
        num_layers=text.num_hidden_layers,
        groups=groups_of(layers, kv_dtype),
        heads=max(seen.heads for seen in layers),
        vocab_size=text.vocab_size,
        context_limit_tokens=limit,
        dtype=kv_dtype,
        extras=functools.reduce(operator.or_, (seen.extras for seen in layers), NO_EXTRAS),
        original_context_tokens=original,
    )


def _part(checked: Checked, ranks: Ranks) -> Part:
    """Raises ModelLoadError."""
    try:
        if checked.whole:
            raise CannotSplit("it sees or hears as well")
        return part_of_model(checked.model_class, checked.config, ranks.place)
    except CannotSplit as error:
        raise _not_so_split(checked, ranks, error) from None


def _not_so_split(checked: Checked, ranks: Ranks, error: CannotSplit) -> ModelLoadError:
    return ModelLoadError(
        f"{checked.model_class.__name__} cannot be split over {ranks.place.degree} ranks: {error}; set "
        "engine.tensor_parallel to 1, or choose another model"
    )


def _of_the_whole(facts: ModelFacts, part: Part, ranks: Ranks) -> ModelFacts:
    """`groups` of the model, beside those of this rank. Raises ModelLoadError where it keeps other heads than others
    expect it to (kv_transfer/shards.py).
    """
    place = ranks.place
    whole = tuple(
        replace(group, kv_heads=part.cuts.kv_heads.get(group.layers[0], group.kv_heads))
        if group.kind == "heads"
        else group
        for group in facts.groups
    )
    if tuple(part_of(group, place.degree, place.rank) for group in whole) != facts.groups:
        raise ModelLoadError(
            f"{facts.name} cannot be split over {place.degree} ranks: its layers would not keep the heads of their "
            "rank; set engine.tensor_parallel to 1"
        )
    return replace(facts, groups=whole, own_groups=facts.groups)


def _with_weights(checked: Checked, part: Part | None = None) -> tuple[Any, dict[str, Grid]]:
    """Reads exactly the files that were checked: the model, and scales of weights whose numbers could be kept, by path
    of the layer. Raises ModelLoadError.
    """
    from safetensors import safe_open

    with contextlib.ExitStack() as opened, quietly(), weights_told(progress):
        slices: dict[str, Any] = {}
        for file in checked.weights.files:
            one: Any = opened.enter_context(safe_open(file, framework="pt"))
            slices |= {name: one.get_slice(name) for name in one.keys()}  # noqa: SIM118 (no dictionary)
        tensors: dict[str, Any] = {}
        grids: dict[str, Grid] = {}
        for name, own in checked.names.items():
            packed = checked.packed.get(name)
            if packed is None:
                piece = slices[name]
            else:
                stored = {role: slices[one] for role, one in packed.parts.items()}
                piece = UnpackedWeight(packed, stored)
                grid = scales_of(packed, stored)
                cut = None if part is None else part.cuts.parameters.get(own)
                if grid is not None and cut is not None:
                    grid = grid.cut(cut.ranges)
                if grid is not None:
                    grids[own.removesuffix(".weight")] = grid
            if part is not None:
                piece = part.take(own, piece)
            if piece is not None:
                tensors[own] = piece
        model, info = (checked.model_class if part is None else part.model_class).from_pretrained(
            None,
            config=checked.config,
            state_dict=tensors,
            dtype=checked.dtype,
            attn_implementation=ATTENTION_NAME,
            experts_implementation=PLAIN,
            output_loading_info=True,
        )
    check_loading(checked.directory, info)
    if checked.whole:
        drop_other_parts(model)
    return model, grids
