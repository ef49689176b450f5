"""The tables of tensors, read with suspicion: each kind of damage is one sentence with file, cause and fix."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.files import CheckpointError
from checkpoint.weights import check_no_scales, read_weights
from tests.support.checkpoints import LFS_POINTER, write_safetensors

TENSORS = {"a.weight": ("F32", (4, 3)), "b.weight": ("BF16", (8,))}


def one_file(directory: Path) -> Path:
    return write_safetensors(directory / "model.safetensors", TENSORS)


def two_files(directory: Path) -> Path:
    write_safetensors(directory / "model-1.safetensors", {"a.weight": ("F32", (4, 3))})
    write_safetensors(directory / "model-2.safetensors", {"b.weight": ("BF16", (8,))})
    placed = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return index


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_weights(directory)
    said = str(caught.value)
    assert "\n" not in said
    assert str(directory) in said
    assert "; " in said, f"no fix: {said}"
    return said


def test_names_types_and_shapes(tmp_path: Path) -> None:
    one_file(tmp_path)
    weights = read_weights(tmp_path)
    assert {n: (t.dtype, t.shape) for n, t in weights.tensors.items()} == TENSORS
    assert all(t.is_plain for t in weights.tensors.values())
    assert weights.files == (tmp_path / "model.safetensors",)


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    two_files(tmp_path)
    write_safetensors(tmp_path / "consolidated.safetensors", TENSORS)  # beside them, of another tool
    weights = read_weights(tmp_path)
    assert [f.name for f in weights.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert set(weights.tensors) == set(TENSORS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: b"", "is empty"),
        (lambda content: LFS_POINTER, "is a Git LFS pointer.*git lfs pull"),
        (lambda content: content[:5], "cut short within its table"),
        (lambda content: content[:40], "cut short within its table"),
        (lambda content: content[:-1], "is cut short: 63 bytes of weights where 64"),
        (lambda content: content + b"x", "is longer than its table says"),
        (lambda content: struct.pack("<Q", 1 << 62) + content[8:], "no safetensors file"),
        (lambda content: content.replace(b'"F32"', b'"F99"'), "a.weight is of type F99"),
        (lambda content: content.replace(b"[4, 3]", b"[4, 2]"), "a.weight has 48 bytes"),
        (lambda content: content.replace(b"[4, 3]", b"[-4,3]"), "other things than numbers|malformed"),
        (lambda content: content.replace(b'"shape"', b'"shapE"'), "an entry is malformed|'shape'"),
        (lambda content: content[:8] + b"[" * 100 + content[108:], "cannot be right"),
        (lambda content: b"PK\x03\x04" + content, "no safetensors file|cannot be right"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    path = one_file(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    import re

    assert re.search(words, refused(tmp_path))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([], "holds a JSON list where an object is expected"),
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {"a.weight": 3}}, "names no safetensors file beside it"),
        ({"weight_map": {"a.weight": "../elsewhere.safetensors"}}, "names no safetensors file beside it"),
        ({"weight_map": {"a.weight": "model-3.safetensors"}}, "model-3.safetensors cannot be read"),
        ({"weight_map": {"c.weight": "model-1.safetensors"}}, "model-1.safetensors lacks c.weight"),
    ],
)
def test_an_index_that_cannot_be_right_is_named(tmp_path: Path, index: object, words: str) -> None:
    two_files(tmp_path).write_text(json.dumps(index))
    assert words in refused(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    two_files(tmp_path)
    write_safetensors(tmp_path / "model-2.safetensors", TENSORS)
    assert "holds a.weight, which model-1.safetensors holds too" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "a format that can run programs"),
        ("model.gguf", "diptych convert"),
        ("consolidated.safetensors", "neither model.safetensors nor"),
        ("README.md", "holds no weights"),
    ],
)
def test_other_formats_are_refused_with_the_way_out(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    assert words in refused(tmp_path)


def test_an_adapter_is_not_left_out_in_silence(tmp_path: Path) -> None:
    one_file(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge the adapter" in refused(tmp_path)


def test_a_broken_link_is_not_an_absent_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "is a link to a file that is not there" in refused(tmp_path)


@pytest.mark.parametrize("last", ["weight_scale_inv", "weight_scale", "qweight", "g_idx", "SCB", "absmax", "x_blocks"])
def test_a_scale_left_over_is_refused(tmp_path: Path, last: str) -> None:
    write_safetensors(tmp_path / "model.safetensors", {**TENSORS, f"a.{last}": ("F32", (1,))})
    weights = read_weights(tmp_path)
    with pytest.raises(CheckpointError, match=rf"holds a\.{last}, a part of quantized weights that config.json"):
        check_no_scales(weights, TENSORS.keys())
    check_no_scales(weights, weights.tensors.keys())  # a model that has it for its own reasons
