"""An adapter in PEFT's format: a directory with adapter_config.json and adapter_model.safetensors.

Its identity is the digest of what it computes: weights and scaling. A name is only an alias. What we do not compute
exactly is refused with the reason: a setting that we do not know may change what an adapter means.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.model_errors import AdapterError

TARGETS = frozenset(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
MOST_RANK = 512
_MOST_ALPHA = 1e9
_KEPT_AS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_CONFIG_BYTES = 1 << 20
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_VERSION = b"diptych-adapter-1"  # of the arithmetic
# Of PEFT's settings: what says nothing about what is computed, or is looked at below.
_KNOWN = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"),
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying"),
}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the model's own weights


@dataclass(frozen=True, slots=True)
class Adapter:
    """As checked at start. `shapes`: by the path of a linear layer: rank, inputs, outputs. `largest`: magnitude of what
    A and scaled B hold. Its weights stay on disk.
    """

    name: str
    directory: Path
    digest: str
    scaling: float
    shapes: Mapping[str, tuple[int, int, int]]
    largest: float
    file_bytes: int  # of its weights

    @property
    def rank(self) -> int:
        return max(rank for rank, _, _ in self.shapes.values())


Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by path: A [rank, inputs] and B [outputs, rank]


def read_adapter(name: str, directory: str) -> Adapter:
    """Raises AdapterError."""
    return _read(name, Path(directory))[0]


def read_with_weights(name: str, directory: str, most_bytes: int | None = None) -> tuple[Adapter, Pairs]:
    """Weights as in `read_again`; `most_bytes`: of their file. Raises AdapterError."""
    found, pairs = _read(name, Path(directory), most_bytes)
    return found, {path: _scaled(pair, found.scaling) for path, pair in pairs.items()}


def read_again(adapter: Adapter) -> Pairs:
    """Its weights, with the scaling in B, float32. Raises AdapterError where these are others than at start."""
    changed = _error(
        adapter.name,
        "its files have changed since it was loaded; load it again (`diptych adapters load`), or start the worker "
        "again",
    )
    with contextlib.suppress(OSError):  # told when it is read
        if (adapter.directory / _WEIGHTS).stat().st_size != adapter.file_bytes:
            raise changed
    found, pairs = read_with_weights(adapter.name, str(adapter.directory), adapter.file_bytes)
    if found.digest != adapter.digest:
        raise changed
    return pairs


def _scaled(pair: tuple[torch.Tensor, torch.Tensor], scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    return pair[0].float(), pair[1].float() * scaling


def _bytes_of(path: Path, most: int | None) -> bytes:
    """Raises OSError or ValueError; whatever else it is, it does not hold up who reads it."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name} is no file")
    if most is not None and found.st_size > most:
        raise ValueError(
            f"{path.name} has {found.st_size} bytes, more than the {most} there is room for (engine.adapters.max_rank)"
        )
    with path.open("rb") as file:
        return file.read(-1 if most is None else most)


def _read(name: str, directory: Path, most_bytes: int | None = None) -> tuple[Adapter, Pairs]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        config = json.loads(_bytes_of(directory / _CONFIG, _MOST_CONFIG_BYTES))
        data = _bytes_of(directory / _WEIGHTS, most_bytes)
        tensors = load(data)
    except FileNotFoundError as error:
        raise _error(name, f"{directory} has no {Path(str(error.filename)).name}; save it with safetensors") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise _error(name, f"it cannot be read from {directory}: {error}; save it again") from None
    if not isinstance(config, dict):
        raise _error(name, f"{_CONFIG} is no JSON object; save it again")
    scaling = _scaling(name, config)
    pairs = _pairs(name, tensors, config["r"])
    digest = hashlib.sha256(_VERSION + f"|{scaling!r}|".encode() + hashlib.sha256(data).digest()).hexdigest()[:32]
    shapes = {path: (len(a), a.shape[1], len(b)) for path, (a, b) in pairs.items()}
    largest = max(t.abs().max().item() for pair in pairs.values() for t in _scaled(pair, scaling))
    return Adapter(name, directory, digest, scaling, shapes, largest, len(data)), pairs


def _scaling(name: str, config: Mapping[str, Any]) -> float:
    """Of an adapter whose settings are all understood."""
    if config.get("peft_type") != "LORA":
        raise _error(name, f"its peft_type is {config.get('peft_type')}, and only LORA is served")
    if config.get("bias", "none") != "none":
        raise _error(name, f"it trains biases (bias: {config['bias']}); train it with bias none")
    if config.get("use_dora"):
        raise _error(name, "it is a DoRA adapter, which rescales whole weights; merge it into its model")
    if config.get("modules_to_save"):
        raise _error(name, f"it replaces whole modules ({config['modules_to_save']}); merge it into its model")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise _error(
            name,
            f"init_lora_weights is {config['init_lora_weights']}, which changes the model's own weights; convert it to "
            "a plain adapter, as PEFT's documentation says, or merge it into its model",
        )
    odd = sorted(key for key, value in config.items() if value and key not in _KNOWN)
    if odd:
        raise _error(name, f"it has {odd[0]} ({config[odd[0]]}), which is not served; train it without")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise _error(name, f"its rank is {str(rank)[:40]}; use 1 to {MOST_RANK}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _MOST_ALPHA:  # nor is NaN
        raise _error(
            name, f"its lora_alpha is {str(alpha)[:40]}, which is no number up to {_MOST_ALPHA:g}; train it again"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pairs(name: str, tensors: Mapping[str, torch.Tensor], rank: int) -> Pairs:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        known = _NAME.fullmatch(key)
        if known is None:
            raise _error(name, f"it has a tensor {key}, which is no part of a plain LoRA adapter; merge it")
        if known[1].rpartition(".")[2] not in TARGETS:
            raise _error(name, f"it adapts {known[1]}; only {', '.join(sorted(TARGETS))} are served")
        if tensor.dtype not in _KEPT_AS or tensor.dim() != 2 or not tensor.numel():
            raise _error(name, f"{key} is no matrix of floating-point numbers of 16 bits or more; save it as float32")
        if not bool(tensor.isfinite().all()):
            raise _error(name, f"{key} has elements that are no finite numbers")
        found.setdefault(known[1], {})[known[2]] = tensor
    if not found:
        raise _error(name, "it has no weights")
    for path, pair in found.items():
        if len(pair) < 2:
            raise _error(name, f"{path} has only one of lora_A and lora_B; save it again")
        if len(pair["A"]) != rank or pair["B"].shape[1] != rank:
            raise _error(name, f"{path} has another rank than {rank}; train all layers with one")
    return {path: (pair["A"], pair["B"]) for path, pair in found.items()}


def _error(name: str, why: str) -> AdapterError:
    return AdapterError(f"adapter {name!r} cannot be served: {why}")
