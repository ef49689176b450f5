"""What one engine step costs, and what a worker's KV memory holds. Pure.

    step_ms = constant + per_sequence * S + max(floor, per_token * T) + per_context_token * K + per_attention_pair * A

    S   sequences in the step
    T   tokens computed in the step, decodes and prompts
    K   KV tokens that decodes read: the sum of their contexts
    A   (new token, earlier token) pairs of prompts: a chunk of n tokens after s computed ones has n * (s + n / 2)

All coefficients are milliseconds. `floor_ms` is the time that reading the weights takes however few tokens there are:
a roofline is flat until it is compute-bound. A linear fit leaves it 0 and puts everything fixed in the constant.

The file is JSON, and is what benchmarks/step_cost.py writes::

    {"format": "diptych-cost-model-1", "name": "smollm2-135m-cpu", "source": "command, machine, commit, date",
     "measured": true,
     "step": {"constant_ms": 0, "per_sequence_ms": 0, "per_token_ms": 0, "per_context_token_ms": 0,
              "per_attention_pair_ms": 0, "floor_ms": 0},
     "kv_bytes_per_token": 23040, "kv_capacity_tokens": 46000,
     "residuals": {"median_relative_error": 0.04, ...}}

`kv_capacity_tokens` and `residuals` may be absent. Other keys are an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

FORMAT = "diptych-cost-model-1"


class CostModelError(ValueError):
    """A cost-model file that cannot be used; says where and why."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Milliseconds; the formula is at the top of the module."""

    constant_ms: float
    per_sequence_ms: float
    per_token_ms: float
    per_context_token_ms: float
    per_attention_pair_ms: float = 0.0
    floor_ms: float = 0.0

    def ms(self, sequences: float, tokens: float, context_tokens: float, attention_pairs: float) -> float:
        return (
            self.constant_ms
            + self.per_sequence_ms * sequences
            + max(self.floor_ms, self.per_token_ms * tokens)
            + self.per_context_token_ms * context_tokens
            + self.per_attention_pair_ms * attention_pairs
        )

    def prompt_ms(self, tokens: int, chunk_tokens: int, start: int = 0) -> float:
        """A prompt alone on a worker: `tokens` new ones after `start` cached ones, in chunks."""
        total, done = 0.0, 0
        while done < tokens:
            n = min(chunk_tokens, tokens - done)
            total += self.ms(1, n, 0, n * (start + done + n / 2))
            done += n
        return total

    def decode_ms(self, sequences: int, context_tokens: float) -> float:
        """A step of decodes alone; `context_tokens` is their sum."""
        return self.ms(sequences, sequences, context_tokens, 0)


@dataclass(frozen=True, slots=True)
class CostModel:
    """One kind of worker serving one model."""

    name: str
    source: str  # where the coefficients are from, for every report that uses them
    measured: bool
    step: StepCost
    kv_bytes_per_token: int
    kv_capacity_tokens: int = 0  # 0: the cluster file has to say
    residuals: Mapping[str, Any] = field(default_factory=dict)


def to_json(model: CostModel) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(model)}


def from_json(data: Any, where: str) -> CostModel:
    """Raises CostModelError."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CostModelError(f'{where}: not a cost model; "format" must be {FORMAT!r}')
    known = {"format", "name", "source", "measured", "step", "kv_bytes_per_token", "kv_capacity_tokens", "residuals"}
    extra = sorted(set(data) - known)
    if extra:
        raise CostModelError(f"{where}: unknown keys {', '.join(extra)}; known are {', '.join(sorted(known))}")
    try:
        step = StepCost(**{k: _finite(v, f"step.{k}", where) for k, v in dict(data["step"]).items()})
        model = CostModel(
            name=str(data["name"]),
            source=str(data["source"]),
            measured=bool(data["measured"]),
            step=step,
            kv_bytes_per_token=int(_finite(data["kv_bytes_per_token"], "kv_bytes_per_token", where)),
            kv_capacity_tokens=int(_finite(data.get("kv_capacity_tokens", 0), "kv_capacity_tokens", where)),
            residuals=dict(data.get("residuals", {})),
        )
    except (KeyError, TypeError) as error:
        raise CostModelError(f"{where}: {error}; simulator/cost_model.py shows the format") from None
    if step.ms(1, 1, 1, 0) <= 0:
        raise CostModelError(f"{where}: a step of one token would take no time; fit the coefficients again")
    if model.kv_bytes_per_token < 1:
        raise CostModelError(f"{where}: kv_bytes_per_token is {model.kv_bytes_per_token}; it must be at least 1")
    return model


def _finite(value: Any, key: str, where: str) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise CostModelError(f"{where}: {key} is {value}; it must be a number of at least 0")
    return number


def load(path: Path) -> CostModel:
    """Raises CostModelError."""
    try:
        return from_json(json.loads(path.read_text()), str(path))
    except (OSError, ValueError) as error:
        if isinstance(error, CostModelError):
            raise
        raise CostModelError(f"{path}: {error}") from None


def save(model: CostModel, path: Path) -> None:
    path.write_text(json.dumps(to_json(model), indent=1) + "\n")


# Rooflines.


@dataclass(frozen=True, slots=True)
class Device:
    """Published peak figures and the shares of them that we assume are reached."""

    name: str
    matmul_flops: float  # dense, of the dtype served
    memory_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float  # between the devices of one worker, each way
    matmul_share: float = 0.55
    memory_share: float = 0.8


_SCALE_BYTES = 2
# Bytes of a weight by scheme, with its share of the scale of 128 (docs/quantization.md).
WEIGHTS = {"": 2.0, "int8": 1 + _SCALE_BYTES / 128, "int4": 0.5 + _SCALE_BYTES / 128, "fp8": 1 + _SCALE_BYTES / 128}


@dataclass(frozen=True, slots=True)
class ModelShape:
    name: str
    parameters: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # of the feed-forward blocks
    bytes_per_value: int = 2
    weights: str = ""  # a scheme of WEIGHTS, for the feed-forward blocks
    kv: str = ""  # kv8: keys and values of 8 bits, with a scale for each head of each token

    @property
    def kv_bytes_per_token(self) -> int:
        head = self.head_dim + _SCALE_BYTES if self.kv else self.head_dim * self.bytes_per_value
        return 2 * self.layers * self.kv_heads * head

    @property
    def weight_bytes(self) -> float:
        rounded = 3 * self.layers * self.hidden * self.inner if self.weights else 0
        return (self.parameters - rounded) * self.bytes_per_value + rounded * WEIGHTS[self.weights]


# NVIDIA's H200 SXM data sheet: 989 TFLOP/s dense bf16, 4.8 TB/s, 141 GB, NVLink 900 GB/s both ways.
H200 = Device("H200", 989e12, 4.8e12, 141e9, 450e9)
# Meta's Llama 3.1 model cards and configurations.
LLAMA_8B = ModelShape("8B", 8.03e9, 32, 4096, 32, 8, 128, 14336)
LLAMA_70B = ModelShape("70B", 70.6e9, 80, 8192, 64, 8, 128, 28672)

_LAUNCH_MS = 1.0  # host work of a step that the device waits for
_PER_SEQUENCE_MS = 0.005  # sampling and bookkeeping
_ALL_REDUCE_LATENCY_MS = 0.01  # two a layer
_KV_MEMORY_SHARE = 0.9  # of what the weights leave


def exchange(device: Device, shape: ModelShape, tensor_parallel: int) -> tuple[float, float]:
    """What two all-reduces a layer take over the devices' links, in ms: for each token of a step, and for each step."""
    n = tensor_parallel
    if n == 1:
        return 0.0, 0.0
    # A ring moves 2 (n - 1) / n of the activations over each device's link.
    moved = 2 * (n - 1) / n * shape.hidden * shape.bytes_per_value
    return 2 * shape.layers * moved / device.link_bytes_per_s * 1e3, 2 * shape.layers * _ALL_REDUCE_LATENCY_MS


def roofline(device: Device, shape: ModelShape, tensor_parallel: int = 1) -> CostModel:
    """Peak figures times assumed shares; no step of it was measured on the device."""
    n = tensor_parallel
    sharing = min(n, shape.kv_heads)  # with fewer KV heads than ranks, several keep the same one
    flops = device.matmul_flops * device.matmul_share * n
    read = device.memory_bytes_per_s * device.memory_share * n
    weights = shape.weight_bytes
    reduce_ms, latency_ms = exchange(device, shape, n)
    attention_flops = 4 * shape.layers * shape.heads * shape.head_dim  # of one pair: scores and values
    memory = device.memory_bytes * _KV_MEMORY_SHARE * n - weights
    if memory <= 0:
        raise CostModelError(f"{shape.name} does not fit on {n} x {device.name}; use more of them")
    schemes = "".join(f" {scheme}" for scheme in (shape.weights, shape.kv) if scheme)
    source = (
        f"roofline from published figures ({device.matmul_share:.0%} of peak matmul, {device.memory_share:.0%} of peak "
        "memory bandwidth); not measured on a GPU"
    )
    if schemes:
        source += f";{schemes}: bytes alone are counted, as if kernels expanded them for nothing; ours on GPUs do not"
    return CostModel(
        name=f"{shape.name}{schemes} on {n} x {device.name}" if n > 1 else f"{shape.name}{schemes} on {device.name}",
        source=source,
        measured=False,
        step=StepCost(
            constant_ms=_LAUNCH_MS + latency_ms,
            per_sequence_ms=_PER_SEQUENCE_MS,
            per_token_ms=2 * shape.parameters / flops * 1e3 + reduce_ms,
            per_context_token_ms=shape.kv_bytes_per_token / read * n / sharing * 1e3,
            per_attention_pair_ms=attention_flops / flops * 1e3,
            floor_ms=weights / read * 1e3,
        ),
        kv_bytes_per_token=shape.kv_bytes_per_token,
        kv_capacity_tokens=int(memory * sharing / n / shape.kv_bytes_per_token),
    )


_SHAPES = {"8b": LLAMA_8B, "70b": LLAMA_70B}
_PRESET = re.compile(r"h200(?:x(1|2|4|8))?-((8b|70b)(?:-(int8|int4|fp8))?(?:-(kv8))?)")
PRESETS = ("h200-8b", "h200x4-70b")  # and the others of x2, x4, x8; -int8, -int4 or -fp8 for weights, -kv8


def preset(name: str) -> CostModel:
    """By name, as cluster files use it. Raises CostModelError."""
    shape, degree = shape_of(name)
    return roofline(H200, shape, degree)


def shape_of(name: str) -> tuple[ModelShape, int]:
    """Of a preset: the model, and over how many devices. Raises CostModelError."""
    found = _matched(name)
    return replace(_SHAPES[found[3]], weights=found[4] or "", kv=found[5] or ""), int(found[1] or 1)


def preset_of(name: str, degree: int) -> str:
    """The preset of the same model over so many devices."""
    model = _matched(name)[2]
    return f"h200-{model}" if degree == 1 else f"h200x{degree}-{model}"


def with_schemes(name: str, schemes: str) -> str:
    """The preset of the same model and devices, its numbers rounded so. Raises CostModelError."""
    found = _matched(name)
    made = name.removesuffix(found[2]) + f"{found[3]}-{schemes}"
    _matched(made)
    return made


def _matched(name: str) -> re.Match[str]:
    found = _PRESET.fullmatch(name)
    if found is None:
        listed = ", ".join(PRESETS)
        raise CostModelError(
            f"no preset {name!r}; there are {listed} (and x2, x8; with -int8, -int4 or -fp8 for weights, -kv8 for KV, "
            "as in h200-8b-int8-kv8), or give the path of a file"
        )
    return found
