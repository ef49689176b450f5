"""Checkpoints whose weights are kept in fewer bits, packed here by hand as each method publishes it, are served as the
model with the weights that come out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.identity import model_identity
from checkpoint.quantized import Packed
from engine.model_loader import ModelLoadError
from engine.types import SamplingParams, SequenceSpec
from engine.unpack import UnpackedWeight
from tests.model.test_quantization import greedy, runner_of
from tests.support.checkpoints import saved_model
from tests.support.plain_engine import Engine

Tensors = dict[str, torch.Tensor]
FP8_MAX = 448.0
PROMPT = [5 + (7 * i) % 200 for i in range(30)]


def words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers along the last dimension, the first in the lowest bits of 32."""
    each = 32 // bits
    rows = numbers.to(torch.int64).unflatten(-1, (-1, each))
    packed = sum(rows[..., i] << (bits * i) for i in range(each))
    return torch.as_tensor(packed).to(torch.int64).sub(1 << 32).where(torch.as_tensor(packed) >= 1 << 31, packed).int()


def in_groups(weight: torch.Tensor, size: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers from 0 on, zeros, scales: of `size` neighbours of a row."""
    groups = weight.unflatten(1, (-1, size))
    low, high = groups.amin(-1), groups.amax(-1)
    most = (1 << bits) - 1
    scales = ((high - low) / most).clamp(min=1e-4).half()
    zeros = (-low / scales.float()).round().clamp(1, most)
    numbers = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, most)
    return numbers.flatten(1), zeros, scales


def fp8(weight: torch.Tensor, size: int = 16) -> tuple[Tensors, torch.Tensor]:
    rows, columns = -(-weight.shape[0] // size), -(-weight.shape[1] // size)
    scales = torch.empty(rows, columns)
    numbers = torch.empty_like(weight)
    for i in range(rows):
        for j in range(columns):
            at = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            scales[i, j] = weight[at].abs().max() / FP8_MAX
            numbers[at] = weight[at] / scales[i, j]
    stored = numbers.to(torch.float8_e4m3fn)
    right = stored.float()
    for i in range(rows):
        for j in range(columns):
            right[i * size : (i + 1) * size, j * size : (j + 1) * size] *= scales[i, j]
    return {"weight": stored, "weight_scale_inv": scales}, right


def gptq(weight: torch.Tensor, size: int = 16) -> tuple[Tensors, torch.Tensor]:
    """Rows and columns the other way round, zeros less one, columns in an order of their own (desc_act)."""
    numbers, zeros, scales = in_groups(weight, size, 4)
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    index = (torch.arange(weight.shape[1]) // size)[order]
    numbers = numbers[:, order]
    right = (numbers - zeros[:, index]) * scales.float()[:, index]
    return {
        "qweight": words(numbers, 4).t().contiguous(),
        "qzeros": words((zeros - 1).t(), 4),
        "scales": scales.t().contiguous(),
        "g_idx": index.int(),
    }, right


def awq(weight: torch.Tensor, size: int = 16) -> tuple[Tensors, torch.Tensor]:
    numbers, zeros, scales = in_groups(weight, size, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(columns: torch.Tensor) -> torch.Tensor:
        return words(columns.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4)

    right = (numbers - zeros.repeat_interleave(size, 1)) * scales.float().repeat_interleave(size, 1)
    made = {"qweight": packed(numbers.t()), "qzeros": packed(zeros.t()), "scales": scales.t().contiguous()}
    return made, right


def compressed(weight: torch.Tensor, size: int = 16) -> tuple[Tensors, torch.Tensor]:
    """Signed numbers without zeros, in words with 8 added."""
    groups = weight.unflatten(1, (-1, size))
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    numbers = (groups / scales.float()[..., None]).round().clamp(-8, 7)
    right = (numbers * scales.float()[..., None]).flatten(1)
    made = {
        "weight_packed": words(numbers.flatten(1) + 8, 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return made, right


def by_row(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / FP8_MAX
    stored = (weight / scales).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scales}, stored.float() * scales


def of_compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}


METHODS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]]] = {
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}, fp8),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}, gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, awq),
    "packed": (of_compressed("pack-quantized", num_bits=4, type="int", group_size=16), compressed),
    "floats": (of_compressed("float-quantized", num_bits=8, type="float"), by_row),
}


def pack(
    path: Path, into: Path, section: dict[str, Any], how: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
) -> tuple[Path, Path]:
    """The projections of the checkpoint packed, and the same checkpoint with the weights that come out."""
    packed, plain = into / "packed", into / "plain"
    for directory in (packed, plain):
        shutil.copytree(path, directory)
    stored = load_file(path / "model.safetensors")
    small: Tensors = {}
    right: Tensors = dict(stored)
    for name, weight in stored.items():
        if not name.endswith("_proj.weight"):
            small[name] = weight
            continue
        made, right[name] = how(weight.float())
        small |= {f"{name.removesuffix('weight')}{end}": part.contiguous() for end, part in made.items()}
    save_file(small, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(right, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    return packed, plain


def plain_model(path: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **settings).eval().requires_grad_(False)


def answer(path: Path, **settings: Any) -> tuple[list[int], str]:
    engine = Engine(runner_of(path, **settings))
    assert engine.core.add(SequenceSpec(1, PROMPT, SamplingParams(max_tokens=8)), 0.0) is None
    engine.run()
    return engine.answers[1], engine.runner.describe_path()


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_the_one_whose_weights_come_out(tmp_path: Path, method: str) -> None:
    section, how = METHODS[method]
    size = {"hidden_size": 48, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
    packed, plain = pack(saved_model(tmp_path / "model", **size), tmp_path, section, how)
    tokens, path = answer(packed)
    assert tokens == greedy(plain_model(plain), PROMPT, 8)
    assert ("weights unpacked from" in path) == (method != "floats"), "kept (test_stored_numbers.py)"
    again, _ = answer(packed, quantization="int8")
    assert again == answer(plain, quantization="int8")[0], "rounded once more, as a plain checkpoint is"


def test_transformers_unpacks_fp8_alike(tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config

    section, _ = METHODS["fp8"]
    size = {"hidden_size": 48, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
    packed, _ = pack(saved_model(tmp_path / "model", **size), tmp_path, section, fp8)
    theirs = plain_model(packed, quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16)))
    assert answer(packed)[0] == greedy(theirs, PROMPT, 8)


def test_experts_in_four_bits_as_transformers_unpacks_them(tmp_path: Path) -> None:
    """gpt-oss: two numbers of E2M1 a byte, an exponent for 32."""
    from transformers import Mxfp4Config

    size = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    layers = {"layer_types": ["full_attention"] * 2, "rope_parameters": None}
    model = saved_model(tmp_path / "model", "GptOss", **layers, **size)
    stored = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = stored.pop(name).shape
        stored[f"{name}_blocks"] = torch.randint(
            0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8
        )
        stored[f"{name}_scales"] = torch.randint(
            121, 125, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8
        )
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (model / "config.json").write_text(json.dumps(config))
    theirs = plain_model(model, quantization_config=Mxfp4Config(dequantize=True))
    tokens, path = answer(model)
    assert tokens == greedy(theirs, PROMPT, 8)
    assert "mxfp4" in path


@pytest.mark.parametrize(("size", "columns"), [(48, 64), (16, 40), (64, 64)])
def test_groups_are_of_the_size_that_is_said(size: int, columns: int) -> None:
    """The last one may be shorter; nothing is inferred from how many there are."""
    numbers = torch.randint(-8, 8, (2100, columns), generator=torch.Generator().manual_seed(4))
    scales = torch.rand(2100, -(-columns // size)) + 0.1
    parts = {"numbers": words(numbers + 8, 4), "scales": scales}
    packed = UnpackedWeight(Packed("packed", {}, (2100, columns), 4, block=(1, size), offset=8), parts)
    assert torch.equal(packed[...], numbers * scales[:, torch.arange(columns) // size])
    eight = numbers.to(torch.int8)
    scaled = UnpackedWeight(
        Packed("scaled", {}, (2100, columns), block=(1, size)), {"numbers": eight, "scales": scales}
    )
    assert torch.equal(scaled[...], numbers * scales[:, torch.arange(columns) // size])


def test_a_scale_that_is_no_number_is_refused() -> None:
    parts = {
        "numbers": torch.zeros(1, 8, 1, 16, dtype=torch.uint8),
        "scales": torch.full((1, 8, 1), 255, dtype=torch.uint8),
    }
    with pytest.raises(ModelLoadError, match="no number"):
        UnpackedWeight(Packed("mxfp4", {}, (1, 32, 8), 4), parts)[...]


def test_other_arithmetic_is_another_model(tmp_path: Path) -> None:
    section, how = METHODS["packed"]
    size = {"hidden_size": 48, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
    packed, _ = pack(saved_model(tmp_path / "model", **size), tmp_path, section, how)
    config = json.loads((packed / "config.json").read_text())
    assert runner_of(packed).facts.identity != model_identity(config, [packed / "model.safetensors"])


def test_what_does_not_fit_its_shape_is_refused(tmp_path: Path) -> None:
    section, how = METHODS["packed"]
    size = {"hidden_size": 48, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
    packed, _ = pack(saved_model(tmp_path / "model", **size), tmp_path, section, how)
    stored = load_file(packed / "model.safetensors")
    name = next(name for name in stored if name.endswith("weight_shape"))
    stored[name] = stored[name] - 1
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="which is not supported"):
        runner_of(packed)


def test_a_rank_reads_its_part_of_them(tmp_path: Path) -> None:
    """Whatever is cut from a weight is cut from what comes out."""
    blocks = torch.randint(0, 256, (3, 8, 2, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    scales = torch.randint(120, 130, (3, 8, 2), dtype=torch.uint8)
    experts = UnpackedWeight(Packed("mxfp4", {}, (3, 64, 8), 4), {"numbers": blocks, "scales": scales})
    assert torch.equal(experts[1:3, :, 2:6], experts[...][1:3, :, 2:6])
    made, right = compressed(torch.randn(16, 32, generator=torch.Generator().manual_seed(3)))
    parts = {"numbers": made["weight_packed"], "scales": made["weight_scale"]}
    packed = UnpackedWeight(Packed("packed", {}, (16, 32), 4, block=(1, 16), offset=8), parts)
    assert torch.equal(packed[...], right)
    assert torch.equal(packed[4:8, 16:], right[4:8, 16:])
