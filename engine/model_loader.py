"""A transformers checkpoint, checked before its weights are read and probed after.

Any causal model whose attention goes through transformers' attention interface works. What would be computed wrongly
(windows, soft-capped scores, attention sinks, recurrent layers) is refused with the reason.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.merged_linear import merge_projections
from settings.model_path import ModelPathError, resolve_model

ATTENTION_NAME = "diptych_paged"


class ModelLoadError(Exception):
    """The model cannot be served; the message names cause and fix."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rest of the engine needs to know of a model. `identity` is equal for equal checkpoints."""

    name: str
    identity: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_limit_tokens: int
    dtype: str


def load_model(
    model: str, dtype: str, device: torch.device, context_limit_tokens: int | None
) -> tuple[Any, ModelFacts]:
    """Returns the model in eval mode on `device`, and its facts. Raises ModelLoadError."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would be one long line in a log
    try:
        path = resolve_model(model)
    except ModelPathError as error:
        raise ModelLoadError(str(error)) from None
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read the configuration of {model}: {_first_line(error)}") from error
    limit = check_config(config, context_limit_tokens)
    torch_dtype = _dtype(dtype, config)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype, attn_implementation=ATTENTION_NAME)
    except (OSError, ValueError, ImportError) as error:
        raise ModelLoadError(f"cannot load the weights of {model}: {_first_line(error)}") from error
    loaded = loaded.to(device).eval().requires_grad_(False)
    merge_projections(loaded)
    kv_heads, head_dim = probe_attention(loaded, device)
    return loaded, facts_of(config, path, torch_dtype, limit, kv_heads, head_dim)


def check_config(config: Any, context_limit_tokens: int | None) -> int:
    """The context limit to enforce. Raises ModelLoadError for attention that we would compute wrongly."""
    text = config.get_text_config()
    kind = getattr(text, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadError(f"{kind} is an encoder-decoder model; Diptych serves causal language models")
    model_limit = getattr(text, "max_position_embeddings", None)
    limit = context_limit_tokens or model_limit
    if limit is None:
        raise ModelLoadError(f"{kind} states no context limit; set engine.context_limit_tokens")
    if model_limit is not None and limit > model_limit:
        raise ModelLoadError(
            f"engine.context_limit_tokens is {limit} and the model's limit is {model_limit}; lower the first"
        )
    window = getattr(text, "sliding_window", None)
    if window is not None and getattr(text, "use_sliding_window", True):
        types = set(getattr(text, "layer_types", None) or ["sliding_attention"])
        if "sliding_attention" in types and limit > window:
            raise ModelLoadError(
                f"{kind} uses sliding-window attention over {window} tokens, which is not supported beyond its "
                f"window; set engine.context_limit_tokens to at most {window}, or choose another model"
            )
    odd = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        raise ModelLoadError(f"{kind} has layers of type {', '.join(sorted(odd))}; only full attention is supported")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ModelLoadError(f"{kind} soft-caps its attention scores, which is not supported; choose another model")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise ModelLoadError(f"{kind} uses latent attention (MLA), which is not supported; choose another model")
    return limit


class _ShapesOnly:
    """Stands in for a step's attention: notes what comes, returns zeros."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        self.seen.append((layer, tuple(key.shape)))
        return torch.zeros_like(query).transpose(1, 2)


def probe_attention(model: Any, device: torch.device) -> tuple[int, int]:
    """(kv_heads, head_dim), seen rather than read: two tokens go through the model, and every layer must come to our
    attention once, all with one shape. Raises ModelLoadError for a model that does otherwise.
    """
    name = type(model).__name__
    shapes = _ShapesOnly()
    try:
        with torch.inference_mode():
            model(
                input_ids=torch.tensor([[0, 0]], device=device),
                position_ids=torch.tensor([[0, 1]], device=device),
                use_cache=False,
                diptych_step=shapes,
            )
    except Exception as error:  # model code may fail in any way when its attention is not the one it knows
        raise ModelLoadError(f"{name} cannot be served: {_first_line(error)}") from error
    layers = [layer for layer, _ in shapes.seen]
    sizes = {size for _, size in shapes.seen}
    if layers != list(range(model.config.get_text_config().num_hidden_layers)) or len(sizes) != 1:
        raise ModelLoadError(
            f"{name} cannot be served: its attention ran for layers {layers[:4]}... with shapes {sorted(sizes)[:3]}; "
            "every layer must run standard attention once, all with the same number of heads"
        )
    _, kv_heads, num_tokens, head_dim = sizes.pop()
    if num_tokens != 2:
        raise ModelLoadError(f"{name} cannot be served: its attention changes the number of tokens")
    return kv_heads, head_dim


def facts_of(config: Any, path: str, dtype: torch.dtype, limit: int, kv_heads: int, head_dim: int) -> ModelFacts:
    text = config.get_text_config()
    return ModelFacts(
        name=Path(path).name,
        identity=model_identity(config, path),
        num_layers=text.num_hidden_layers,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=text.vocab_size,
        context_limit_tokens=limit,
        dtype=str(dtype).removeprefix("torch."),
    )


def model_identity(config: Any, path: str) -> str:
    """Names the weights: configuration plus each weight file's name, size and first 64 KiB.

    Two workers with different checkpoints must not exchange KV; a full read of the weights would cost start-up.
    The head of a safetensors file holds its table of tensors, so a re-quantized or re-trained file of equal size still
    differs in its first tensors.
    """
    h = hashlib.sha256()
    described = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    h.update(json.dumps(described, sort_keys=True, default=str).encode())
    for file in sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else ():
        h.update(f"{file.name}:{file.stat().st_size}".encode())
        with file.open("rb") as f:
            h.update(f.read(1 << 16))
            f.seek(max(0, file.stat().st_size - (1 << 16)))
            h.update(f.read())
    return h.hexdigest()[:32]


def _dtype(dtype: str, config: Any) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    wanted = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return wanted if isinstance(wanted, torch.dtype) else torch.bfloat16


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
