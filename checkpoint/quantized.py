"""Checkpoints whose weights are kept in fewer bits: which stored tensors make up which weight, without reading one.

    method of quantization_config   what is stored beside, or in place of, `x.weight`
    fp8                             x.weight in F8_E4M3, x.weight_scale_inv by blocks or for the whole (DeepSeek, Qwen)
    mxfp4                           x_blocks, two numbers a byte, and x_scales, an exponent for 32 numbers (gpt-oss)
    gptq                            x.qweight, x.qzeros, x.scales, x.g_idx: 4 or 8 bits, packed along the inputs
    awq                             x.qweight, x.qzeros, x.scales: 4 bits, packed along the outputs, in AWQ's own order
    compressed-tensors              x.weight_packed, x.weight_scale, x.weight_shape (pack-quantized); x.weight in
                                    F8_E4M3 or I8 and x.weight_scale (float-, int- and naive-quantized)

`unpacked` gives the checkpoint as if its weights were plain; engine/unpack.py computes them. All else is refused by
name: what is not known here would be computed wrongly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from checkpoint.files import CheckpointError
from checkpoint.weights import StoredTensor, Weights

_PLAIN = "use the checkpoint in bfloat16, float16 or float32"
_OTHER_FILES = ("hf_quant_config.json",)
# Copies of config.json's section that some tools leave.
_COPIES = {"quantize_config.json": ("gptq",), "quant_config.json": ("awq",)}


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight, and how it is kept. `parts`: names of stored tensors, by what each is to it."""

    method: str  # scaled, mxfp4, gptq, awq or packed
    parts: Mapping[str, str]
    shape: tuple[int, ...]  # of the weight as the model has it
    bits: int = 8
    block: tuple[int, int] = (0, 0)  # of weights that share a scale, the last ones fewer; 0: one, or all of them
    zeros_less_one: bool = False  # as GPTQ's first format keeps zeros
    offset: int = 0  # added to signed numbers before they were packed


@dataclass(frozen=True, slots=True)
class Unpacked:
    weights: Weights  # as if plain: scales are gone
    packed: Mapping[str, Packed] = field(default_factory=dict)  # by name of the weight
    words: str = ""  # such as "gptq, 4 bits"; empty: nothing is packed


def unpacked(directory: Path, config: Mapping[str, Any], weights: Weights) -> Unpacked:
    """`config`: config.json. Raises CheckpointError."""
    section, where = _section(directory, config)
    if section is None:
        return Unpacked(weights)
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    read = _METHODS.get(str(method))
    if read is None or not isinstance(section, Mapping):
        raise CheckpointError(
            f"{directory / 'config.json'} has {where} of method {str(method or '?')[:40]}, which is not supported "
            f"({', '.join(_METHODS)} are); {_PLAIN}"
        )
    for name, methods in _COPIES.items():
        if os.path.lexists(directory / name) and method not in methods:
            raise _says_otherwise(directory, name)
    try:
        packed, words = read(section, _Found(dict(weights.tensors), config))
        for name, one in packed.items():
            if name in weights.tensors and name not in one.parts.values():
                raise _Refused(f"{name} is there both plain and packed")
    except _Refused as error:
        raise CheckpointError(
            f"{directory / 'config.json'} has {where} of method {method}, and {error}; {_PLAIN}"
        ) from None
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(
            f"{directory / 'config.json'} has {where} of method {method} that cannot be read ({error}); {_PLAIN}"
        ) from None
    tensors = dict(weights.tensors)
    gone = {part for one in packed.values() for part in one.parts.values()}
    gone |= {name for name in tensors if name.rsplit(".", 1)[-1] in ("input_scale", "activation_scale")}
    for name in gone:
        tensors.pop(name, None)
    for name, one in packed.items():
        first = weights.tensors[next(iter(one.parts.values()))]
        tensors[name] = StoredTensor(first.file, "BF16", one.shape)
    return Unpacked(replace(weights, tensors=tensors), packed, words if packed else "")


def _section(directory: Path, config: Mapping[str, Any]) -> tuple[Any, str]:
    """What says that weights are quantized, and where. Raises CheckpointError for two of them, and for a file."""
    found = []
    for place, section in (("", config), ("text_config.", config.get("text_config"))):
        for key in ("quantization_config", "compression_config"):
            described = section.get(key) if isinstance(section, Mapping) else None
            if described:
                found.append((described, f"{place}{key}"))
    if any(described != found[0][0] for described, _ in found):
        raise CheckpointError(
            f"{directory / 'config.json'} has {' and '.join(where for _, where in found)}, which differ; {_PLAIN}"
        )
    for name in (*_OTHER_FILES, *(() if found else _COPIES)):
        if os.path.lexists(directory / name):
            raise _says_otherwise(directory, name)
    return found[0] if found else (None, "")


def _says_otherwise(directory: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{directory / name} says that the weights are quantized, and config.json does not say so; {_PLAIN}, or remove "
        "the file if it does not belong here"
    )


class _Refused(Exception):
    """Why a form of a method is not supported."""


class _Found:
    """Stored tensors, by the beginning of their names."""

    def __init__(self, tensors: dict[str, StoredTensor], config: Mapping[str, Any]) -> None:
        self.tensors, self.config = tensors, config

    def ending(self, end: str) -> list[str]:
        return [name.removesuffix(end) for name in sorted(self.tensors) if name.endswith(end)]

    def shape(self, name: str, *dtypes: str) -> tuple[int, ...]:
        """Of a tensor that must be there, and of one of these types."""
        if name not in self.tensors:
            raise _Refused(f"there is no {name}")
        if self.tensors[name].dtype not in dtypes:
            raise _Refused(f"{name} is of type {self.tensors[name].dtype}, and {' or '.join(dtypes)} is expected")
        return self.tensors[name].shape

    def matrix(self, name: str, *dtypes: str) -> tuple[int, int]:
        shape = self.shape(name, *dtypes)
        if len(shape) != 2:
            raise _Refused(f"{name} has the shape {list(shape)}, and two dimensions are expected")
        return shape[0], shape[1]

    def of_type(self, *dtypes: str) -> list[str]:
        return [name for name in sorted(self.tensors) if self.tensors[name].dtype in dtypes]


_Read = Callable[[Mapping[str, Any], _Found], tuple[dict[str, Packed], str]]
_SCALES = ("F32", "F16", "BF16", "F8_E8M0", "F64")
_WORDS = ("I32",)
_INDICES = ("I32", "I64")


def _fp8(section: Mapping[str, Any], found: _Found) -> tuple[dict[str, Packed], str]:
    _only(section, "fmt", ("e4m3", None))
    block = section.get("weight_block_size")
    sizes = (0, 0) if block is None else _sizes(section, "weight_block_size")
    packed = {}
    for name in found.of_type("F8_E4M3"):
        packed[name] = _scaled(found, name, f"{name}_scale_inv", sizes)
    for name in found.ending("_scale_inv"):
        if name not in packed:
            raise _Refused(f"{name}_scale_inv is the scale of nothing")
    return packed, "fp8" if block is None else f"fp8, blocks of {sizes[0]} x {sizes[1]}"


def _scaled(found: _Found, name: str, scale: str, block: tuple[int, int], zeros: str = "") -> Packed:
    shape, scales = found.shape(name, "F8_E4M3", "I8"), found.shape(scale, *_SCALES)
    if not _fits(shape, scales, block):
        raise _Refused(f"{scale} has the shape {list(scales)}, which are no scales of {list(shape)}")
    parts = {"numbers": name, "scales": scale}
    if zeros:
        if found.shape(zeros, "I8") != scales:
            raise _Refused(f"{zeros} has another shape than {scale}")
        parts["zeros"] = zeros
    return Packed("scaled", parts, shape, block=block)


def _fits(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> bool:
    if all(n == 1 for n in scales):
        return block == (0, 0) or all(own <= size for own, size in zip(shape[-2:], block, strict=True))
    if len(scales) == 1:  # of rows
        return len(shape) == 2 and scales[0] == shape[0] and block == (0, 0)
    if len(shape) < 2 or len(scales) != len(shape) or scales[:-2] != shape[:-2]:
        return False
    if block == (0, 0):
        return all(n in (1, own) for own, n in zip(shape[-2:], scales[-2:], strict=True))
    return all(-(-own // size) == n for own, n, size in zip(shape[-2:], scales[-2:], block, strict=True))


def _mxfp4(_: Mapping[str, Any], found: _Found) -> tuple[dict[str, Packed], str]:
    if found.config.get("model_type") != "gpt_oss":
        raise _Refused("only gpt-oss is known to keep its experts so")
    packed = {}
    for name in found.ending("_blocks"):
        blocks, scales = found.shape(f"{name}_blocks", "U8"), found.shape(f"{name}_scales", "U8")
        if len(blocks) != 4 or blocks[3] != 16 or scales != blocks[:3]:
            raise _Refused(f"{name}_blocks has the shape {list(blocks)} beside scales of {list(scales)}")
        # transformers keeps experts' weights as inputs x outputs.
        shape = (blocks[0], blocks[2] * 32, blocks[1])
        packed[name] = Packed("mxfp4", {"numbers": f"{name}_blocks", "scales": f"{name}_scales"}, shape, bits=4)
    return packed, "mxfp4"


def _gptq(section: Mapping[str, Any], found: _Found) -> tuple[dict[str, Packed], str]:
    bits = _bits(section, (4, 8))
    forms = {str(section[key]) for key in ("format", "checkpoint_format") if section.get(key)}  # an old name and a new
    if len(forms) > 1 or forms - {"gptq", "gptq_v2"} or section.get("is_marlin_format"):
        raise _Refused(f"its format is {' and '.join(sorted(forms))[:60] or 'marlin'}; only gptq and gptq_v2 are known")
    packed, each = {}, 32 // bits
    for name in found.ending(".qweight"):
        rows, outputs = found.matrix(f"{name}.qweight", *_WORDS)
        groups, same = found.matrix(f"{name}.scales", *_SCALES)
        inputs = rows * each
        zeros = found.matrix(f"{name}.qzeros", *_WORDS)
        index = found.shape(f"{name}.g_idx", *_INDICES)
        if same != outputs or zeros != (groups, outputs // each) or index != (inputs,):
            raise _Refused(f"the tensors of {name} do not fit one another")
        parts = {part: f"{name}.{part}" for part in ("qweight", "scales", "qzeros", "g_idx")}
        packed[f"{name}.weight"] = Packed("gptq", parts, (outputs, inputs), bits, zeros_less_one=forms != {"gptq_v2"})
    return packed, f"gptq, {bits} bits"


def _awq(section: Mapping[str, Any], found: _Found) -> tuple[dict[str, Packed], str]:
    bits = _bits(section, (4,))
    version = str(section.get("version") or section.get("format") or "gemm").lower()
    if version != "gemm":
        raise _Refused(f"its version is {version[:20]}; only gemm is known")
    size = int(section.get("group_size") or section.get("q_group_size") or 0)
    packed = {}
    for name in found.ending(".qweight"):
        inputs, columns = found.matrix(f"{name}.qweight", *_WORDS)
        groups, outputs = found.matrix(f"{name}.scales", *_SCALES)
        own = size if size > 0 else inputs
        zeros = found.matrix(f"{name}.qzeros", *_WORDS)
        if outputs != columns * 8 or zeros != (groups, columns) or groups != -(-inputs // own):
            raise _Refused(f"the tensors of {name} do not fit one another, or groups of {own}")
        parts = {part: f"{name}.{part}" for part in ("qweight", "scales", "qzeros")}
        packed[f"{name}.weight"] = Packed("awq", parts, (outputs, inputs), bits, block=(1, own))
    return packed, "awq, 4 bits"


def _compressed(section: Mapping[str, Any], found: _Found) -> tuple[dict[str, Packed], str]:
    """https://github.com/vllm-project/compressed-tensors describes the formats in its own code alone."""
    for key, why in (("kv_cache_scheme", "scales KV by numbers of its own"), ("transform_config", "rotates weights")):
        if section.get(key):
            raise _Refused(f"it {why} ({key})")
    sparsity = section.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "", "dense"):
        raise _Refused(f"its weights are sparse ({str(sparsity.get('format'))[:30]})")
    schemes = [g["weights"] for g in dict(section.get("config_groups") or {}).values() if g.get("weights")]
    kinds = {
        (str(s.get("type", "int")), int(s["num_bits"]), _block(s), bool(s.get("symmetric", True))) for s in schemes
    }
    if len(kinds) != 1:
        raise _Refused("it names no scheme of weights, or several")
    ((number, bits, block, symmetric),) = kinds
    form = str(section.get("format"))
    packed: dict[str, Packed] = {}
    if form == "pack-quantized" and number == "int" and bits in (4, 8):
        packed = _packed_integers(found, bits, block)
    elif form in ("float-quantized", "naive-quantized", "int-quantized") and bits == 8 and number in ("float", "int"):
        for name in found.of_type("F8_E4M3" if number == "float" else "I8"):
            zeros = f"{name}_zero_point" if f"{name}_zero_point" in found.tensors and number == "int" else ""
            packed[name] = _scaled(found, name, f"{name}_scale", block, zeros)
    else:
        raise _Refused(f"its format is {form[:30]} of {bits}-bit {number[:10]} numbers")
    if not symmetric and (lacking := [name for name, one in packed.items() if "zeros" not in one.parts]):
        raise _Refused(f"its numbers have zeros (symmetric is false), and {lacking[0]} has none")
    return packed, f"compressed-tensors, {bits} bits"


def _block(scheme: Mapping[str, Any]) -> tuple[int, int]:
    """Of weights that share a scale."""
    size = int(scheme.get("group_size") or 0)
    strategy = str(scheme.get("strategy") or ("group" if size > 0 else "channel"))
    if strategy in ("group", "tensor_group") and size > 0:
        return 1, size
    if strategy == "block":
        return _sizes(scheme, "block_structure")
    if strategy in ("channel", "tensor"):
        return 0, 0
    raise _Refused(f"its scales are by {strategy[:20]}")


def _sizes(section: Mapping[str, Any], key: str) -> tuple[int, int]:
    match section.get(key):
        case [int(rows), int(columns)] if rows > 0 < columns:
            return rows, columns
        case other:
            raise _Refused(f"its {key} is {str(other)[:40]}; two whole numbers above 0 are expected")


def _packed_integers(found: _Found, bits: int, block: tuple[int, int]) -> dict[str, Packed]:
    packed, each = {}, 32 // bits
    if block[0] > 1:
        raise _Refused("its packed numbers have scales by blocks")
    for name in found.ending(".weight_packed"):
        outputs, columns = found.matrix(f"{name}.weight_packed", *_WORDS)
        rows, groups = found.matrix(f"{name}.weight_scale", *_SCALES)
        inputs = columns * each
        own = block[1] or inputs
        parts = {"numbers": f"{name}.weight_packed", "scales": f"{name}.weight_scale"}
        for part, end, shape in (
            ("shape", "weight_shape", (2,)),
            ("zeros", "weight_zero_point", (-(-outputs // each), groups)),
            ("g_idx", "weight_g_idx", (inputs,)),
        ):
            if f"{name}.{end}" in found.tensors:
                if found.shape(f"{name}.{end}", *_INDICES) != shape:
                    raise _Refused(f"{name}.{end} has the shape {list(found.shape(f'{name}.{end}', *_INDICES))}")
                parts[part] = f"{name}.{end}"
        if rows != outputs or groups != -(-inputs // own):
            raise _Refused(f"the tensors of {name} do not fit one another, or groups of {own}")
        packed[f"{name}.weight"] = Packed(
            "packed", parts, (outputs, inputs), bits, block=(1, own), offset=1 << (bits - 1)
        )
    return packed


def _only(section: Mapping[str, Any], key: str, known: tuple[Any, ...]) -> None:
    if section.get(key) not in known:
        raise _Refused(f"its {key} is {str(section.get(key))[:30]}")


def _bits(section: Mapping[str, Any], known: tuple[int, ...]) -> int:
    bits = int(section.get("bits") or section.get("w_bit") or 0)
    if bits not in known:
        raise _Refused(f"its numbers have {bits} bits; only {' or '.join(map(str, known))} are known")
    return bits


_METHODS: dict[str, _Read] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}
