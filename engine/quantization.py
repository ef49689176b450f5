"""Weights in 8 or 4 bits: what a quantized model computes, whatever it runs on.

1. A row of a weight [out, in] is cut into groups of 128 columns, the last one maybe shorter. A group has one scale, its
   largest magnitude / 127 (int8), / 7 (int4) or / 448 (fp8), rounded to bfloat16; an element becomes the nearest whole
   number of scales, or the nearest of E4M3 (fp8). There is no zero point: zero stays zero. So does a group whose scale
   would be denormal.
   The experts of a mixture are such weights, one after the other.
2. `quantize` replaces each chosen weight by what these numbers stand for (in float32 exactly), before anything else
   looks at the model. So the trial at start holds every path against the quantized model, and a path that knows nothing
   of quantization serves it as any other: at full size and speed.
3. Kernels that keep the small numbers get them back from weight and scales (`numbers`).
4. The model's identity knows the scheme, and with it names of blocks and fingerprints: quantized otherwise is another
   model.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.functional import pad

from engine.config import groups_in_one_way
from engine.experts.parts import ExpertsModule, experts_of
from engine.kept import FP8, GROUP, WIDE_SCALES, are_floats, group_columns, number_bits, words
from engine.model_errors import ModelLoadError

log = logging.getLogger(__name__)

_PIECE = 256  # rows at once, so that little memory is taken beside the result; whole panels of the kernels
_LEAST = torch.finfo(torch.bfloat16).tiny  # of scales: one below is rounded so far that numbers go beyond `most`
_FLOATS = torch.float8_e4m3fn
_KEPT = {"int8": 8, "int4": 4, "fp8": FP8}
_NAMES = {
    "mlp": {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "w1", "w2", "w3"}
    | {"input_linear", "output_linear"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"},
    "experts": set[str](),  # parameters of modules, no linear layers
}
_WITH_EXPERTS = frozenset({"mlp", "experts"})
_ATTRIBUTE = "diptych_quantized"
_VERSION = 1  # of the arithmetic


@dataclass(frozen=True, slots=True)
class Scheme:
    """`bits`: how numbers are kept (engine/kept.py); `groups`: of layers, sorted: attention, experts, head, mlp."""

    bits: int
    groups: tuple[str, ...]

    def __str__(self) -> str:
        return f"{words(self.bits)} {'+'.join(self.groups)}"

    @property
    def most(self) -> int:
        """The largest number; the least is its negative."""
        return most_of(self.bits)

    @property
    def least_scale(self) -> float:
        """The smallest number times it is normal in bfloat16."""
        return _LEAST / torch.finfo(_FLOATS).smallest_normal * 8 if are_floats(self.bits) else _LEAST

    def identity(self, model: str) -> str:
        """Of the model so quantized."""
        return hashlib.sha256(f"{model}|weights-{_VERSION}|{self}|{GROUP}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Quantized:
    """`paths`: of what `scheme` rounded: linear layers, and the products of experts by parameter. `scales` float32 of
    each, [out, groups] or of experts [count, out, groups], and of layers whose numbers are the checkpoint's
    (engine/stored_numbers.py): until all that needs them is packed; `bits`: how the numbers of each would be kept.
    `kept`: those whose numbers kernels keep. The others are expanded.
    """

    scheme: Scheme | None
    paths: frozenset[str]
    scales: dict[str, torch.Tensor]
    bits: dict[str, int]
    kept: set[str] = field(default_factory=set)
    stored: Stored | None = None

    def __str__(self) -> str:
        """For status: `int8 mlp weights, expanded`."""
        rounded_here = []
        if self.scheme is not None:
            some = f" in {self.expanded} of {len(self.paths)} layers" if self.kept & self.paths else ""
            rounded_here = [f"{self.scheme} weights" + (f", expanded{some}" if self.expanded else "")]
        return ", ".join(rounded_here + ([] if self.stored is None else [self.stored.described(self)]))

    @property
    def expanded(self) -> int:
        """How many layers of those that the scheme rounded."""
        return len(self.paths - self.kept)

    def alike(self, paths: Sequence[str]) -> Alike | None:
        """Of layers that are packed together; None where they are of several kinds, or plain."""
        kinds = {self.bits[path] & ~WIDE_SCALES if path in self.scales else 0 for path in paths}
        if len(kinds) > 1 or 0 in kinds:
            return None
        bits = functools.reduce(operator.or_, (self.bits[path] for path in paths))  # wide, if any is
        return Alike([self.scales[path] for path in paths], bits)

    def packed(self, where: str) -> None:
        """Everything is: the packed copies have scales of their own. `where`: what computes."""
        self.scales.clear()
        if self.stored is not None:
            log.info("%s: %s", where, self.stored.described(self))
        if self.expanded:
            log.warning(
                "%s: no kernel here keeps them so, and they take as much memory and time as others: %s", self, where
            )


class Stored(Protocol):
    """What a checkpoint keeps in fewer bits (engine/stored_numbers.py)."""

    def described(self, small: Quantized, /) -> str: ...


class Alike(NamedTuple):
    """Layers whose numbers are kept in one way."""

    scales: list[torch.Tensor]
    bits: int


def scheme_of(quantization: str, groups: tuple[str, ...]) -> Scheme | None:
    """Of engine.quantization and engine.quantized_groups."""
    if quantization == "none":
        return None
    return Scheme(_KEPT[quantization], groups_in_one_way(groups))


def most_of(bits: int) -> int:
    return int(torch.finfo(_FLOATS).max) if are_floats(bits) else 2 ** (number_bits(bits) - 1) - 1


def quantized(model: Any) -> Quantized | None:
    return getattr(model, _ATTRIBUTE, None)


def set_quantized(model: Any, found: Quantized) -> None:
    setattr(model, _ATTRIBUTE, found)


@torch.no_grad()
def quantize(model: Any, scheme: Scheme) -> Quantized:
    """Of a model as transformers has it. Raises ModelLoadError where a group has no layers that can be quantized."""
    scales: dict[str, torch.Tensor] = {}
    for group in scheme.groups:
        layers = dict(layers_of(model, group))
        mixtures = _mixtures(model) if group in _WITH_EXPERTS else []
        if group == "experts" and not mixtures:
            raise _refused(model, "it has no experts")
        if not layers and not mixtures:
            raise _refused(model, f"it has no linear layers that are known as {group}")
        for experts in mixtures:
            for path, weight in zip(experts.paths, (experts.up, experts.down), strict=True):
                scales[path] = _round_in_place(
                    model, path, [experts.rows(weight, e) for e in range(len(weight))], scheme
                )
        for path, layer in layers.items():
            _check_finite(model, f"{path}.weight", layer.weight)
            scales[path] = scales_of(layer.weight, scheme)
            weight = rounded(layer.weight, scales[path], scheme.bits)
            layer.weight = nn.Parameter(weight, requires_grad=False)  # a tied embedding keeps its own
    found = Quantized(scheme, frozenset(scales), scales, dict.fromkeys(scales, scheme.bits))
    set_quantized(model, found)
    return found


def check_parts(model: Any, scheme: Scheme, columns: Mapping[str, Sequence[tuple[int, int]]]) -> None:
    """`columns`: of weights whose columns are cut, by parameter, those of this rank. They must be whole groups,
    or scales would be others than in one process. Raises ModelLoadError.
    """
    for name, kept in columns.items():
        if name.endswith(".weight"):
            layer, advice = name.removesuffix(".weight").rpartition(".")[2], ""
            named = any(layer in _NAMES[group] for group in scheme.groups if group != "head")
        else:
            named, advice = bool(_WITH_EXPERTS & set(scheme.groups)), " (raise engine.expert_parallel to keep it whole)"
        if named and any(start % GROUP or end % GROUP for start, end in kept):
            why = f"over ranks, {name} would not be cut between groups of {GROUP} that share a scale{advice}"
            raise _refused(model, why)


def layers_of(model: Any, group: str) -> Iterator[tuple[str, Any]]:
    """The linear layers of a group, with their paths."""
    head = model.get_output_embeddings() if group == "head" else None
    for path, module in model.named_modules():
        known = module is head if group == "head" else path.rpartition(".")[2] in _NAMES[group]
        if known and _plain(module):
            yield path, module


def scales_of(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """weight [out, in] -> [out, groups] float32, each a number that bfloat16 has."""
    largest = torch.empty((len(weight), -(-weight.shape[1] // GROUP)), device=weight.device, dtype=torch.float32)
    for rows in pieces(len(weight)):
        largest[rows] = _in_groups(weight[rows].float().abs()).amax(-1)
    scales = (largest / scheme.most).bfloat16().float()
    return torch.where(scales >= scheme.least_scale, scales, 1.0)


def numbers(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """[out, in] int8, or float8_e4m3fn. Of a weight that these scales were made for, before or after: rounding to
    bfloat16 moves an element by less than a quarter of a scale, or of the next number of E4M3.
    """
    # A scale that was rounded down would give 7.02, 127.4 or 449: all become what they are. Numbers of checkpoints may
    # go one further below zero.
    most = most_of(bits)
    floats, group = are_floats(bits), group_columns(bits)
    made = torch.empty(weight.shape, dtype=_FLOATS if floats else torch.int8, device=weight.device)
    for rows in pieces(len(weight)):
        each = _in_groups(weight[rows].float(), group) / scales[rows, :, None]
        each = each.clamp(-most, most) if floats else each.round().clamp(-most - 1, most)
        made[rows] = _joined(each, weight.shape[1]).to(made.dtype)
    return made


def dequantized(numbers: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """[out, in] float32; exact with scales of bfloat16: 8 bits times 8 bits at most."""
    group = group_columns(bits)
    made = torch.empty(numbers.shape, dtype=torch.float32, device=numbers.device)
    for rows in pieces(len(numbers)):
        made[rows] = _joined(_in_groups(numbers[rows].float(), group) * scales[rows, :, None], numbers.shape[1])
    return made


def pieces(count: int) -> Iterator[slice]:
    """Of so many rows."""
    return (slice(start, min(count, start + _PIECE)) for start in range(0, count, _PIECE))


def rounded(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """What its numbers stand for, in its own type."""
    made = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for rows in pieces(len(weight)):
        made[rows] = dequantized(numbers(weight[rows], scales[rows], bits), scales[rows], bits)
    return made


def _mixtures(model: Any) -> list[ExpertsModule]:
    """Raises ModelLoadError for experts that nothing here knows: most of the model would silently stay as it is."""
    found = list(experts_of(model))
    known = {id(experts.module) for experts in found}
    for path, module in model.named_modules():
        name = type(module).__name__
        if name.endswith("Experts") and id(module) not in known and not any(_plain(m) for m in module.modules()):
            raise _refused(model, f"{path} has experts of a class that is not known here ({name})")
    return found


def _round_in_place(model: Any, path: str, experts: list[torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """`experts`: [out, in] of each. A copy of all would be most of the model again."""
    scales: list[torch.Tensor] = []
    for number, weight in enumerate(experts):
        _check_finite(model, f"{path}, expert {number},", weight)
        scales.append(scales_of(weight, scheme))
        weight.copy_(rounded(weight, scales[-1], scheme.bits))
    return torch.stack(scales)


def _check_finite(model: Any, name: str, weight: torch.Tensor) -> None:
    if not all(weight[rows].isfinite().all() for rows in pieces(len(weight))):
        raise _refused(model, f"{name} has elements that are no finite numbers")


def _in_groups(weight: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """[out, in] -> [out, groups, columns of one], zeros behind the last"""
    return pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))


def _joined(groups: torch.Tensor, columns: int) -> torch.Tensor:
    return groups.flatten(1)[:, :columns]


def _plain(module: Any) -> bool:
    return type(module) is nn.Linear and module.weight.is_floating_point()


def _refused(model: Any, why: str) -> ModelLoadError:
    return ModelLoadError(
        f"{type(model).__name__} cannot be quantized: {why}; set engine.quantization to none, engine.quantized_groups "
        "to other groups, or choose another model"
    )
