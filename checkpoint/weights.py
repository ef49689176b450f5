"""The tables of tensors at the head of safetensors files: names, types and shapes, without reading a weight.

    8 bytes: length of the table | table, JSON: name -> dtype, shape, range of bytes | the bytes

Which files belong to the checkpoint is decided here and nowhere else: what is checked, hashed and loaded is the same.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.files import CheckpointError, check_directory, read_object

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_TABLE_BYTES = 100 << 20  # as the library has it
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}
_FETCH = "download or copy it again"
_PLAIN = "use the checkpoint in bfloat16, float16 or float32"
# The last parts of names that quantization leaves beside weights, whatever wrote them.
_SCALES = frozenset(
    (
        *("weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "k_scale", "v_scale", "output_scale"),
        *("scales", "qweight", "qzeros", "g_idx", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"),
        *("SCB", "absmax", "quant_map", "quant_state", "nested_absmax", "weight_format"),
    )
)
_SCALE_ENDS = ("_scale_inv", "_scales", "_blocks", "_qweight", "_qzeros", "_packed")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    file: Path
    dtype: str  # safetensors' word: F32, BF16, I8, ...
    shape: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """A floating-point type that computing in needs no scale for."""
        return self.dtype in ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Weights:
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]


def read_weights(directory: Path) -> Weights:
    """The checkpoint's tensors, every table checked against its file. Raises CheckpointError."""
    check_directory(directory)
    files, placed = _files(directory)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _table(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{file} holds {name}, which {tensors[name].file.name} holds too; remove the file that does not "
                    "belong to this checkpoint"
                )
            tensors[name] = tensor
    for name, file in placed.items():
        if name not in tensors:
            raise CheckpointError(f"{file} lacks {name}, which {_INDEX} says it holds; {_FETCH}")
    if not tensors:
        raise CheckpointError(f"{files[0]} holds no tensors; {_FETCH}")
    return Weights(files, tensors)


def check_no_scales(weights: Weights, known: Collection[str]) -> None:
    """Raises CheckpointError for a part of quantized weights. `known`: names that the model's own code has."""
    for name, tensor in weights.tensors.items():
        last = name.rsplit(".", 1)[-1]
        if (last in _SCALES or last.endswith(_SCALE_ENDS)) and name not in known:
            raise CheckpointError(
                f"{tensor.file} holds {name}, a part of quantized weights that config.json says nothing of; {_PLAIN}"
            )


def _files(directory: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """In which order they are read, and where the index places each tensor."""
    one, index = directory / _ONE, directory / _INDEX
    if os.path.lexists(directory / "adapter_config.json"):
        raise CheckpointError(
            f"{directory / 'adapter_config.json'} makes this the directory of an adapter, which would be left out; "
            "merge the adapter into its base model and save that"
        )
    if os.path.lexists(one):
        return (one,), {}
    if os.path.lexists(index):
        placed = read_object(index).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise CheckpointError(f"{index} has no weight_map of names and files; {_FETCH}")
        for name, file in placed.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index} places {name} in {str(file)[:100]!r}, which names no safetensors file beside it; {_FETCH}"
                )
        return tuple(directory / file for file in sorted(set(placed.values()))), {
            name: directory / file for name, file in placed.items()
        }
    others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5"))
    others += sorted(p.name for p in directory.glob("*.safetensors"))
    if any(name.endswith(".gguf") for name in others):
        raise CheckpointError(
            f"{directory} holds {others[0]} and no {_ONE}; convert it: "
            f"diptych convert {directory / others[0]} DIRECTORY"
        )
    if others and others[0].endswith(".safetensors"):
        raise CheckpointError(f"{directory} holds {others[0]} and neither {_ONE} nor {_INDEX}; {_FETCH}")
    if others:
        raise CheckpointError(
            f"{directory} holds its weights in {others[0]}, a format that can run programs, and no {_ONE}; convert it "
            "with transformers on a machine that you can lose (from_pretrained, then save_pretrained)"
        )
    raise CheckpointError(f"{directory} holds no weights ({_ONE}, or {_INDEX} and its files); {_FETCH}")


def _table(file: Path) -> dict[str, StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(_MAX_TABLE_BYTES, size - 8):
                raise CheckpointError(f"{file} is no safetensors file, or cut short within its table; {_FETCH}")
            raw = opened.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); {_FETCH}") from None
    try:
        table = json.loads(raw)
        if not isinstance(table, dict):
            raise ValueError("it is no object")
        table.pop("__metadata__", None)
        return _parsed(file, table, size - 8 - length)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = error.args[0] if isinstance(error, ValueError) and error.args else "an entry is malformed"
        raise CheckpointError(f"{file} has a table of tensors that cannot be right ({said}); {_FETCH}") from None


def _parsed(file: Path, table: dict[str, Any], room: int) -> dict[str, StoredTensor]:
    """Raises ValueError, KeyError or TypeError for what is no table, CheckpointError for a file that is cut short."""
    tensors, ranges = {}, []
    for name, entry in table.items():
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in _BITS:
            raise ValueError(f"{name} is of type {str(dtype)[:20]}")
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise ValueError(f"{name} has a shape of other things than numbers")
        if (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
            raise ValueError(f"{name} has {end - start} bytes and the shape {list(shape)} of {dtype}")
        tensors[name] = StoredTensor(file, dtype, shape)
        ranges.append((start, end))
    at = 0
    for start, end in sorted(ranges):
        if start != at:
            raise ValueError("its tensors overlap or leave gaps")
        at = end
    if at != room:
        what = "cut short" if at > room else "longer than its table says"
        raise CheckpointError(f"{file} is {what}: {room} bytes of weights where {at} are expected; {_FETCH}")
    return tensors
