"""Reads a checkpoint that engine/model_check.py has found in order, and compares again what was loaded."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint.identity import model_identity
from engine.attention.interface import ATTENTION_NAME, NO_EXTRAS, AttentionRefused, ExtrasUsed
from engine.experts.choose import PLAIN
from engine.latent import serve_latent
from engine.load_progress import weights_told
from engine.longrope import choose_by_row, original_context
from engine.merged_linear import merge_projections
from engine.model_check import Checked, check_loading, check_model, one_sentence, quietly
from engine.model_errors import ModelLoadError, meant_for_people
from engine.model_probe import LayerSeen, attention_layers, groups_of, probe_layers
from engine.position_trial import NoReference, Reference, take_reference
from engine.text_part import drop_other_parts, text_section
from kv_transfer.layout import Group
from settings.model_path import model_name
from settings.phases import phase, progress

__all__ = ["ModelFacts", "ModelLoadError", "Trial", "facts_of", "load_model", "prepare"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rest of the engine needs to know of a model. `identity` is equal for equal checkpoints."""

    name: str
    identity: str
    num_layers: int
    groups: tuple[Group, ...]
    heads: int  # of queries, the most of any layer
    vocab_size: int
    context_limit_tokens: int
    dtype: str
    extras: ExtrasUsed = NO_EXTRAS
    original_context_tokens: int = 0  # beyond, a sequence is computed again (engine/longrope.py); 0: never


def load_model(
    model: str, dtype: str, device: torch.device, context_limit_tokens: int | None
) -> tuple[Any, ModelFacts, Trial]:
    """Returns the model in eval mode on `device`, its facts, and what it computes by itself. Raises ModelLoadError."""
    checked = check_model(model, dtype, context_limit_tokens)
    with one_sentence(checked.directory), ThreadPoolExecutor(1, thread_name_prefix="identity") as beside:
        identity = beside.submit(model_identity, checked.described, checked.weights.files)
        loaded = _with_weights(checked)
        loaded = loaded.to(device).eval().requires_grad_(False)
        phase("trying the model")
        name, limit = model_name(model), checked.context_limit_tokens
        trial, layers = prepare(loaded, text_section(checked.described), checked.dtype, limit)
        original = trial.reference.original
        if not identity.done():
            phase("hashing the weights")
        facts = facts_of(checked.config, name, identity.result(), checked.dtype, limit, layers, original)
    return loaded, facts, trial


@dataclass(frozen=True, slots=True)
class Trial:
    """What every path that may serve the model is held against (engine/position_trial.py)."""

    reference: Reference
    described: Mapping[str, Any]


def prepare(model: Any, described: Mapping[str, Any], dtype: torch.dtype, limit: int) -> tuple[Trial, list[LayerSeen]]:
    """Looks at a model as transformers has it, then makes it ours. Raises ModelLoadError."""
    device = model.get_input_embeddings().weight.device
    trial = take_trial(model, described, dtype, limit)
    if trial.reference.original:
        choose_by_row(model, trial.reference.original)
    serve_latent(model, limit)
    merge_projections(model)
    return trial, probe_layers(model, device, limit)


def take_trial(model: Any, described: Mapping[str, Any], dtype: torch.dtype, limit: int) -> Trial:
    """Of a model as transformers has it. Raises ModelLoadError."""
    device = model.get_input_embeddings().weight.device
    layers, original = attention_layers(model, device, limit), original_context(model, limit)
    try:
        reference = take_reference(model, described, dtype, limit, layers, original)
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


def _with_weights(checked: Checked) -> Any:
    """Reads exactly the files that were checked. Raises ModelLoadError."""
    from safetensors import safe_open

    with contextlib.ExitStack() as opened, quietly(), weights_told(progress):
        tensors: dict[str, Any] = {}
        for file in checked.weights.files:
            one: Any = opened.enter_context(safe_open(file, framework="pt"))
            stored = [name for name in one.keys() if name in checked.names]  # noqa: SIM118 (no dictionary)
            tensors.update((checked.names[name], one.get_slice(name)) for name in stored)
        model, info = checked.model_class.from_pretrained(
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
    return model
