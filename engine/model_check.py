"""Whether a checkpoint can be served, as far as can be known without reading its weights: in seconds, for any size.

1. What can never be served comes first: files, quantization, the kind of model, its attention (tried on tensors
   without content).
2. Every tensor that the model has is in the checkpoint, every tensor of the checkpoint is in the model, in one shape
   and in a type that needs no interpretation.
3. Then what a setting can mend, the context limit: so no advice leads to the next refusal.

Any causal model whose attention goes through transformers' attention interface works. What would be computed wrongly
(windows, soft-capped scores, attention sinks, recurrent layers) is refused with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.files import CheckpointError, first_line, read_object
from checkpoint.limits import context_limit
from checkpoint.prediction_heads import without_heads
from checkpoint.quantized import Packed, unpacked
from checkpoint.weights import Weights, check_no_scales, read_weights
from engine.attention.interface import ATTENTION_NAME, AttentionRefused, register
from engine.latent import serve_latent
from engine.model_errors import ModelLoadError, RankLost
from engine.model_probe import KEEPS_NOTHING, probe_layers
from engine.text_part import TextPart, text_parts
from settings.model_path import ModelPathError, resolve_model

_LAYER_TYPES = {
    "full_attention", "sliding_attention", "chunked_attention", "indexed_attention",
    "linear_attention", "conv", "hybrid", "hybrid_sliding", *KEEPS_NOTHING,
}  # fmt: skip
_OTHER_PURPOSE = re.compile(
    r"For((?:Sequence|Token|Image|Audio)Classification|QuestionAnswering|MultipleChoice|MaskedLM|RewardModel\w*)$"
)
_NAMED = 3  # tensors in one sentence; more are counted
_SOME_LIMIT = 4096  # positions, to look at a model that states none

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checked:
    """A checkpoint that can be served, as far as can be known without reading its weights."""

    directory: Path
    described: Mapping[str, Any]  # config.json as it stands
    config: Any  # of the text, as transformers reads it
    weights: Weights
    names: Mapping[str, str]  # of the model, by the checkpoint's; tensors without one belong to no text
    dtype: torch.dtype
    context_limit_tokens: int
    model_class: Any
    whole: bool  # the model sees or hears as well
    packed: Mapping[str, Packed]  # weights that the checkpoint keeps in fewer bits, by its names
    packed_words: str  # how; empty: none is


def check_model(model: str, dtype: str, context_limit_tokens: int | None) -> Checked:
    """All that can be known without reading weights, in seconds. Raises ModelLoadError."""
    try:
        directory = Path(resolve_model(model))
    except ModelPathError as error:
        raise ModelLoadError(str(error)) from None
    with one_sentence(directory):
        described = read_object(directory / "config.json")
        found = unpacked(directory, described, read_weights(directory))
        weights = found.weights
        config = _configuration(directory)
        check_kind(config)
        part = _served_part(config, directory, weights, _tried_limit(config, described, context_limit_tokens))
        limit = choose_limit(config, described, context_limit_tokens)
        return Checked(
            directory,
            described,
            part.config,
            weights,
            part.names,
            _dtype(dtype, config),
            limit,
            part.model_class,
            part.whole,
            found.packed,
            found.words,
        )


@contextlib.contextmanager
def one_sentence(directory: Path) -> Iterator[None]:
    """Whatever a library raises leaves as one sentence."""
    try:
        yield
    except (ModelLoadError, RankLost):
        raise
    except CheckpointError as error:
        raise ModelLoadError(str(error)) from None
    except Exception as error:
        log.debug("loading %s", directory, exc_info=True)
        raise ModelLoadError(
            f"{directory} cannot be loaded ({type(error).__name__}: {first_line(error)}); correct its config.json, or "
            "choose another model"
        ) from error


def _configuration(directory: Path) -> Any:
    from transformers import AutoConfig

    with quietly():
        try:
            return _as_if_plain(AutoConfig.from_pretrained(directory, trust_remote_code=False))
        except Exception as error:
            said = first_line(error)
            if "trust_remote_code" in str(error):
                said = "it names a program of its own (auto_map), which is not run"
            elif "does not recognize this architecture" in str(error):
                said = "transformers knows no model of its model_type"
            raise ModelLoadError(
                f"{directory / 'config.json'} is no configuration that transformers can use ({said}); download or copy "
                "it again, or choose another model"
            ) from error


def _as_if_plain(config: Any) -> Any:
    """Weights that are packed are computed as they are read (engine/unpack.py): transformers need not know."""
    for one in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            if hasattr(one, name):
                delattr(one, name)
    return config


def check_kind(config: Any) -> None:
    """Raises ModelLoadError for attention that we would compute wrongly, whatever the settings."""
    text = config.get_text_config()
    kind = getattr(text, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadError(
            f"{kind} is an encoder-decoder model, and only causal language models are served; choose another model"
        )
    purpose = _OTHER_PURPOSE.search(_name_of(config))
    if purpose is not None:
        raise ModelLoadError(
            f"{_name_of(config)} was trained for something else than to go on with text "
            f"({purpose[1]}); choose another model, or correct `architectures` in its config.json"
        )
    if not isinstance(getattr(text, "num_hidden_layers", None), int):
        raise ModelLoadError(
            f"{kind} states no number of layers (num_hidden_layers): it is no single stack of decoder layers, and "
            "others are not supported; choose another model"
        )
    odd = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if odd:
        raise ModelLoadError(
            f"{kind} has layers of type {', '.join(sorted(map(str, odd)))}; only attention that is full, or over a "
            "window or chunk, and recurrent layers are supported: choose another model"
        )


def _tried_limit(config: Any, described: Mapping[str, Any], wanted: int | None) -> int:
    """Of the limits that are stated, the smallest; whether they can be had together is said last."""
    return min((n for n in (wanted, _stated_limit(config, described)) if n), default=_SOME_LIMIT)


def _stated_limit(config: Any, described: Mapping[str, Any]) -> int | None:
    return context_limit(described, getattr(config.get_text_config(), "max_position_embeddings", None))


def choose_limit(config: Any, described: Mapping[str, Any], wanted: int | None) -> int:
    """The context limit to enforce. Raises ModelLoadError, with a limit that would do."""
    kind = getattr(config.get_text_config(), "model_type", "?")
    model_limit = _stated_limit(config, described)
    limit = wanted or model_limit
    if limit is None:
        raise ModelLoadError(f"{kind} states no context limit; set engine.context_limit_tokens")
    if model_limit is not None and limit > model_limit:
        raise ModelLoadError(
            f"engine.context_limit_tokens is {limit} and the model's limit is {model_limit}; set it to at most "
            f"{model_limit}"
        )
    return limit


def _name_of(config: Any) -> str:
    return str((getattr(config, "architectures", None) or [getattr(config, "model_type", "?")])[0])


def _served_part(config: Any, directory: Path, weights: Weights, limit: int) -> TextPart:
    """The first way to read the text that fits; if none does, what the first one met is raised."""
    name = _name_of(config)
    refusals: list[Exception] = []
    for part in text_parts(config, without_heads(config.get_text_config(), weights.tensors)):
        try:
            _try_without_weights(part, name, directory, limit)
            _check_tensors(directory, part, weights)
            return part
        except (ModelLoadError, CheckpointError) as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    raise ModelLoadError(f"{name} is no causal language model that transformers has; choose another model")


def _try_without_weights(part: TextPart, name: str, directory: Path, limit: int) -> None:
    """`probe_layers` on tensors that have shapes and no content. Raises ModelLoadError."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    register()
    looks_at_values = (DataDependentOutputException, DynamicOutputShapeException)
    try:
        with quietly(), FakeTensorMode(), torch.inference_mode():
            made = part.model_class._from_config(
                copy.deepcopy(part.config), attn_implementation=ATTENTION_NAME, dtype=torch.bfloat16
            )
            _check_positions(made, name)
            serve_latent(made, limit)
            probe_layers(made, torch.device("cpu"), limit)
    except ModelLoadError as error:
        if error.__cause__ is None or isinstance(error.__cause__, AttentionRefused):
            raise
        log.debug("%s may look at values, so it is tried when it has its weights", name, exc_info=True)
    except looks_at_values:
        log.debug("%s looks at values, so it is tried when it has its weights", name, exc_info=True)
    except KeyError as error:
        if ATTENTION_NAME in str(error):
            raise ModelLoadError(
                f"{name} picks its attention from a list of its own, where paged attention cannot be; choose another "
                "model"
            ) from error
        raise _unusable(directory, error) from error
    except Exception as error:
        raise _unusable(directory, error) from error


def _check_positions(model: Any, name: str) -> None:
    """Decoders that were made for an encoder count their tokens from the start of each call, or are told their
    positions. Raises ModelLoadError.
    """
    embedding = model.get_input_embeddings()
    decoder = next((m for m in model.modules() if embedding in m.children()), model)
    told = "position_ids" in inspect.signature(decoder.forward).parameters
    if not told and getattr(type(model.config), "is_encoder_decoder", False):
        raise ModelLoadError(
            f"{name} cannot be served: it is the decoder of an encoder-decoder model, and counts positions from the "
            "start of each step; choose another model"
        )


def _unusable(directory: Path, error: Exception) -> ModelLoadError:
    return ModelLoadError(
        f"{directory / 'config.json'} describes no model that can be built ({type(error).__name__}: "
        f"{first_line(error)}); download or copy it again, or choose another model"
    )


def _check_tensors(directory: Path, part: TextPart, weights: Weights) -> None:
    """The checkpoint's table of tensors against the model's. Raises ModelLoadError or CheckpointError."""
    model, info = _matched(directory, part, weights, plain_only=False)
    own = model.state_dict()
    check_no_scales(weights, own.keys())
    check_loading(directory, info)
    if all(weights.tensors[name].is_plain for name in part.names):
        return
    try:
        _, without = _matched(directory, part, weights, plain_only=True)
        needed = [name for name in sorted(without["missing_keys"]) if own[name].is_floating_point()]
    except ModelLoadError:  # a part of something that is put together
        needed = [""]
    for name in needed:
        odd = {
            own: weights.tensors[stored] for stored, own in part.names.items() if not weights.tensors[stored].is_plain
        }
        shown = name if name in odd else min(odd)
        raise ModelLoadError(
            f"{odd[shown].file} holds {shown} as {odd[shown].dtype}, which has no meaning without a scale; use the "
            "checkpoint in bfloat16, float16 or float32"
        )


def _matched(directory: Path, part: TextPart, weights: Weights, *, plain_only: bool) -> tuple[Any, dict[str, Any]]:
    """What transformers makes of tensors without content: renamed, merged and split as the real ones will be."""
    empty: dict[str, torch.Tensor] = {}
    for stored, name in part.names.items():
        tensor = weights.tensors[stored]
        if name in empty:
            raise ModelLoadError(f"{tensor.file} holds {stored} under a second name; download or copy it again")
        if tensor.is_plain or not plain_only:
            empty[name] = torch.empty(tensor.shape, dtype=torch.float32, device="meta")
    prefix = getattr(part.model_class, "base_model_prefix", "")
    twice = next((name for name in empty if prefix and f"{prefix}.{name}" in empty), None)
    if twice is not None:
        file = next(weights.tensors[stored].file for stored, name in part.names.items() if name == twice)
        raise ModelLoadError(
            f"{file} holds {twice} and {prefix}.{twice}, which are one tensor of the model; download or copy it again"
        )
    said: list[str] = []
    with quietly(said):
        try:
            return part.model_class.from_pretrained(
                None,
                config=part.config,
                state_dict=empty,
                device_map={"": "meta"},
                dtype=torch.float32,
                attn_implementation=ATTENTION_NAME,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise ModelLoadError(
                f"the tensors in {directory} do not fit the model that its config.json describes "
                f"({_reported(said) or first_line(error)}); download or copy the checkpoint again"
            ) from error


def _reported(said: list[str]) -> str:
    """Of transformers' report: which tensors could not be put together."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(said))
    names = re.findall(r"^(\S+) +\| *CONVERSION", plain, re.MULTILINE)
    return f"parts of {_names(names)} are missing or of another shape" if names else ""


def check_loading(directory: Path, info: Mapping[str, Any]) -> None:
    """Raises ModelLoadError for anything but a complete checkpoint of exactly this model."""
    fix = "download or copy the checkpoint again, or correct its config.json"
    mismatched = sorted(info["mismatched_keys"], key=lambda entry: entry[0])
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise ModelLoadError(
            f"{directory} holds {name} in the shape {list(stored)} where config.json asks for {list(wanted)}"
            f"{_more(mismatched)}; {fix}"
        )
    if info["missing_keys"]:
        raise ModelLoadError(f"{directory} lacks weights of the model: {_names(info['missing_keys'])}; {fix}")
    if info["unexpected_keys"]:
        raise ModelLoadError(
            f"{directory} holds weights that the model has no place for: {_names(info['unexpected_keys'])}; {fix}"
        )
    if info.get("error_msgs"):
        raise ModelLoadError(f"{directory} cannot be loaded ({str(info['error_msgs'][0])[:200]}); {fix}")


def _names(found: Any) -> str:
    shown = sorted(found)
    return ", ".join(shown[:_NAMED]) + _more(shown[_NAMED - 1 :])


def _more(found: list[Any]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""


@contextlib.contextmanager
def quietly(said: list[str] | None = None) -> Iterator[None]:
    """transformers prints tables and bars into a log that is not its own; `said` gets what it would have said."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    logger = logging.getLogger("transformers")
    fake = logging.getLogger("torch._subclasses.fake_tensor")
    fake_level = fake.level
    fake.setLevel(logging.CRITICAL)
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if said is not None:
                said.append(record.getMessage())

    logger.handlers, logger.propagate = [Kept()], False
    logger.setLevel(logging.WARNING if said is not None else logging.ERROR)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
        fake.setLevel(fake_level)


def _dtype(dtype: str, config: Any) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    wanted = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return wanted if isinstance(wanted, torch.dtype) else torch.bfloat16
