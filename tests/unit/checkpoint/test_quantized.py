"""Which stored tensors are which weights: shapes alone, for every method that is known, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoint.files import CheckpointError
from checkpoint.quantized import Unpacked, unpacked
from checkpoint.weights import read_weights
from tests.support.checkpoints import write_safetensors

Tensors = dict[str, tuple[str, tuple[int, ...]]]
NORM: Tensors = {"norm.weight": ("F32", (64,))}


def seen(directory: Path, section: Any, tensors: Tensors, **config: Any) -> Unpacked:
    write_safetensors(directory / "model.safetensors", {**NORM, **tensors})
    described = {"model_type": "gpt_oss", "quantization_config": section, **config}
    return unpacked(directory, described, read_weights(directory))


def refused(directory: Path, section: Any, tensors: Tensors, **config: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        seen(directory, section, tensors, **config)
    return str(caught.value)


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
FP8_TENSORS: Tensors = {
    "a.weight": ("F8_E4M3", (48, 64)), "a.weight_scale_inv": ("F32", (2, 2)), "a.input_scale": ("F32", (1,)),
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
GPTQ_TENSORS: Tensors = {
    "a.qweight": ("I32", (8, 48)), "a.qzeros": ("I32", (2, 6)), "a.scales": ("F16", (2, 48)), "a.g_idx": ("I32", (64,)),
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
AWQ_TENSORS: Tensors = {
    "a.qweight": ("I32", (64, 6)), "a.qzeros": ("I32", (2, 6)), "a.scales": ("F16", (2, 48)),
}  # fmt: skip
MXFP4_TENSORS: Tensors = {
    "e_blocks": ("U8", (3, 48, 2, 16)),
    "e_scales": ("U8", (3, 48, 2)),
}
PACKED: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
}  # fmt: skip


def of(form: str, **weights: Any) -> dict[str, Any]:
    """Of 4-bit integers."""
    groups = {"group_0": {"weights": {"num_bits": 4, "type": "int", **weights}}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


PACKED_TENSORS: Tensors = {
    "a.weight_packed": ("I32", (48, 8)), "a.weight_scale": ("BF16", (48, 2)), "a.weight_shape": ("I64", (2,)),
}  # fmt: skip
FLOATS: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
}  # fmt: skip
FLOAT_TENSORS: Tensors = {
    "a.weight": ("F8_E4M3", (48, 64)),
    "a.weight_scale": ("F32", (48, 1)),
}


@pytest.mark.parametrize(
    ("section", "tensors", "name", "shape", "words"),
    [
        (FP8, FP8_TENSORS, "a.weight", (48, 64), "fp8, blocks of 32 x 32"),
        (GPTQ, GPTQ_TENSORS, "a.weight", (48, 64), "gptq, 4 bits"),
        (AWQ, AWQ_TENSORS, "a.weight", (48, 64), "awq, 4 bits"),
        ({"quant_method": "mxfp4"}, MXFP4_TENSORS, "e", (3, 64, 48), "mxfp4"),
        (PACKED, PACKED_TENSORS, "a.weight", (48, 64), "compressed-tensors, 4 bits"),
        (FLOATS, FLOAT_TENSORS, "a.weight", (48, 64), "compressed-tensors, 8 bits"),
    ],
)
def test_weights_are_seen_as_if_plain(
    tmp_path: Path, section: Any, tensors: Any, name: str, shape: tuple[int, ...], words: str
) -> None:
    found = seen(tmp_path, section, tensors)
    assert set(found.weights.tensors) == {"norm.weight", name}
    assert (found.weights.tensors[name].dtype, found.weights.tensors[name].shape) == ("BF16", shape)
    assert set(found.packed) == {name}
    assert found.words == words


def test_a_plain_checkpoint_is_as_it_was(tmp_path: Path) -> None:
    found = seen(tmp_path, None, {}, text_config={})
    assert (set(found.weights.tensors), found.packed, found.words) == ({"norm.weight"}, {}, "")


def changed(tensors: Tensors, name: str, *shape: int) -> dict[str, Any]:
    return {**tensors, name: (tensors[name][0], shape)}


def without(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("section", "tensors", "words"),
    [
        ({"quant_method": "nobody-knows-it"}, {}, "of method nobody-knows-it, which is not supported"),
        ({"bits": 4}, {}, "of method ?"),
        (["fp8"], {}, "of method ?"),
        ({"quant_method": ["fp8"]}, {}, "not supported"),
        ({**FP8, "fmt": "e5m2"}, FP8_TENSORS, "its fmt is e5m2"),
        *(
            ({**FP8, "weight_block_size": size}, FP8_TENSORS, "; two whole numbers above 0 are expected")
            for size in (["many"], [], [0, 128], [128, -1], [32], 32, "32", [32.0, 32.0], [32, 32, 32])
        ),
        (FP8, without(FP8_TENSORS, "a.weight_scale_inv"), "there is no a.weight_scale_inv"),
        (FP8, without(FP8_TENSORS, "a.weight"), "the scale of nothing"),
        (FP8, changed(FP8_TENSORS, "a.weight_scale_inv", 2, 3), "no scales of"),
        (FP8, changed(FP8_TENSORS, "a.weight_scale_inv", 47), "no scales of"),
        ({**GPTQ, "bits": 3}, GPTQ_TENSORS, "3 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, GPTQ_TENSORS, "its format is marlin"),
        ({**GPTQ, "format": "gptq", "checkpoint_format": "gptq_v2"}, GPTQ_TENSORS, "its format is gptq and gptq_v2"),
        ({**GPTQ, "is_marlin_format": True}, GPTQ_TENSORS, "its format is marlin"),
        (FP8, {**FP8_TENSORS, "a.weight_scale_inv": ("U8", (2, 2))}, "is of type U8"),
        ({**FP8, "weight_block_size": None}, FP8_TENSORS, "no scales of"),
        ({**FP8, "weight_block_size": None}, changed(FP8_TENSORS, "a.weight", 2, 2, 64), "no scales of"),
        (AWQ, {**AWQ_TENSORS, "a.qweight": ("I16", (64, 6))}, "is of type I16"),
        ({**AWQ, "group_size": 64}, AWQ_TENSORS, "groups of 64"),
        (GPTQ, {**GPTQ_TENSORS, "a.weight": ("F32", (48, 64))}, "both plain and packed"),
        (of("pack-quantized", group_size=48), PACKED_TENSORS | {"a.weight_scale": ("F16", (48, 3))}, "groups of 48"),
        (of("pack-quantized", group_size=32, symmetric=False), PACKED_TENSORS, "a.weight has none"),
        ({**PACKED, "transform_config": {"config_groups": {"u": {}}}}, PACKED_TENSORS, "rotates weights"),
        (of("pack-quantized", strategy="token"), PACKED_TENSORS, "its scales are by token"),
        (GPTQ, without(GPTQ_TENSORS, "a.g_idx"), "there is no a.g_idx"),
        (GPTQ, changed(GPTQ_TENSORS, "a.qzeros", 2, 5), "do not fit one another"),
        ({**AWQ, "version": "gemv"}, AWQ_TENSORS, "its version is gemv"),
        (AWQ, changed(AWQ_TENSORS, "a.scales", 3, 48), "do not fit one another"),
        ({"quant_method": "mxfp4"}, changed(MXFP4_TENSORS, "e_scales", 3, 48, 1), "beside scales of"),
        ({**PACKED, "kv_cache_scheme": {"num_bits": 8}}, PACKED_TENSORS, "kv_cache_scheme"),
        ({**PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}}, PACKED_TENSORS, "sparse"),
        ({**PACKED, "format": "marlin-24"}, PACKED_TENSORS, "its format is marlin-24"),
        ({**PACKED, "config_groups": {}}, PACKED_TENSORS, "no scheme of weights"),
        ({**PACKED, "config_groups": {"group_0": "none"}}, PACKED_TENSORS, "cannot be read"),
        (of("float-quantized", strategy="block", block_structure=[0, 128]), FLOAT_TENSORS, "its block_structure is [0"),
        (PACKED, changed(PACKED_TENSORS, "a.weight_scale", 48, 3), "do not fit one another"),
        (PACKED, changed(PACKED_TENSORS, "a.weight_shape", 3), "weight_shape has the shape"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, section: Any, tensors: Any, words: str) -> None:
    said = refused(tmp_path, section, tensors)
    assert words in said
    assert "use the checkpoint in bfloat16" in said


def test_two_sections_that_differ_are_refused(tmp_path: Path) -> None:
    said = refused(tmp_path, FP8, FP8_TENSORS, text_config={"quantization_config": {"quant_method": "awq"}})
    assert "text_config.quantization_config, which differ" in said


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_file_that_says_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert f"{name} says that the weights are quantized" in refused(tmp_path, None, {})
    if name == "quantize_config.json":
        assert seen(tmp_path, GPTQ, GPTQ_TENSORS).packed, "a copy of config.json's"
        assert "says that the weights are quantized" in refused(tmp_path, AWQ, AWQ_TENSORS)


def test_experts_in_four_bits_are_known_of_gpt_oss_alone(tmp_path: Path) -> None:
    assert "only gpt-oss" in refused(tmp_path, {"quant_method": "mxfp4"}, MXFP4_TENSORS, model_type="llama")


@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
def test_either_name_of_gptqs_second_format_is_read(tmp_path: Path, key: str) -> None:
    (one,) = seen(tmp_path, {**GPTQ, key: "gptq_v2"}, GPTQ_TENSORS).packed.values()
    assert not one.zeros_less_one
    (first,) = seen(tmp_path, GPTQ, GPTQ_TENSORS).packed.values()
    assert first.zeros_less_one


def test_the_last_group_may_be_shorter(tmp_path: Path) -> None:
    """As the method has it: 64 columns in groups of 48 are one of 48 and one of 16."""
    (one,) = seen(tmp_path, of("pack-quantized", group_size=48), PACKED_TENSORS).packed.values()
    assert one.block == (1, 48)
