"""Checkpoints of few bits whose numbers kernels keep as they are stored: the same answers in less memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.quantized import Packed
from engine.attention.interface import Chunk
from engine.kept import FP8, WIDE_SCALES, of_groups
from engine.native.stack import NativeStack
from engine.runner import ModelRunner
from engine.stored_numbers import Grid, scales_of
from engine.types import SamplingParams, SequenceSpec
from kv_transfer.layout import KvLayout
from tests.model.test_quantization import greedy, runner_of
from tests.model.test_unpacked import PROMPT, Tensors, by_row, fp8, in_groups, of_compressed, pack, plain_model, words
from tests.support.checkpoints import saved_model
from tests.support.plain_engine import Engine

SIZE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32
}  # fmt: skip
RAGGED = SIZE | {"hidden_size": 160, "intermediate_size": 200}
How = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def around_zero(weight: torch.Tensor, size: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers, the least of all among them, and float16 scales of `size` neighbours; and what they stand for."""
    groups = weight.unflatten(1, (-1, size))
    least = 1 << (bits - 1)
    scales = (groups.abs().amax(-1) / (least - 0.5)).half()
    numbers = (groups / scales.float()[..., None]).round().clamp(-least, least - 1)
    numbers[..., 0] = -least
    return numbers.flatten(1), scales, (numbers * scales.float()[..., None]).flatten(1)


def gptq(bits: int, size: int, *, in_order: bool = True, middle: int | None = None) -> How:
    zero = 1 << (bits - 1) if middle is None else middle

    def how(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        numbers, scales, _ = around_zero(weight, size, bits)
        numbers = numbers + (1 << (bits - 1))
        index = torch.arange(weight.shape[1]) // size
        if not in_order:
            index = index.flip(0)
        right = (numbers - zero) * scales.float()[:, index]
        zeros = torch.full(scales.shape, zero - 1)
        return {
            "qweight": words(numbers, bits).t().contiguous(),
            "qzeros": words(zeros.t(), bits),
            "scales": scales.t().contiguous(),
            "g_idx": index.int(),
        }, right

    return how


def compressed(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    numbers, scales, right = around_zero(weight, 32, 4)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": words(numbers + 8, 4), "weight_scale": scales, "weight_shape": shape}, right


def whole_rows(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    numbers, scales, right = around_zero(weight, weight.shape[1], 8)
    return {"weight": numbers.to(torch.int8), "weight_scale": scales}, right


def of_gptq(bits: int, size: int, **others: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, **others}


FP8_BLOCKS: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
KEPT: dict[str, tuple[str, dict[str, Any], dict[str, Any], How]] = {
    "fp8": ("Llama", RAGGED, FP8_BLOCKS, lambda weight: fp8(weight, 128)),
    "fp8 by layers": ("Gemma", SIZE, FP8_BLOCKS, lambda weight: fp8(weight, 128)),
    "gptq of 4": ("Qwen2", SIZE, of_gptq(4, 128), gptq(4, 128)),
    "gptq of 8": ("Llama", SIZE, of_gptq(8, 64), gptq(8, 64)),
    "packed": ("Llama", SIZE, of_compressed("pack-quantized", num_bits=4, group_size=32), compressed),
    "floats of rows": ("Llama", RAGGED, of_compressed("float-quantized", num_bits=8, type="float"), by_row),
    "integers of rows": ("Qwen3", SIZE, of_compressed("int-quantized", num_bits=8), whole_rows),
}


def made(tmp_path: Path, family: str, size: dict[str, Any], section: dict[str, Any], how: How) -> tuple[Path, Path]:
    """Packed, and with the weights that come out."""
    return pack(saved_model(tmp_path / "model", family, **size), tmp_path, section, how)


def logits(runner: ModelRunner) -> torch.Tensor:
    chunk = Chunk(0, len(PROMPT), 0, [0, 1, 2, 3])
    with torch.inference_mode():
        return runner.forward.forward(runner.kv, PROMPT, list(range(len(PROMPT))), [chunk], range(len(PROMPT))).clone()


def tokens_of(runner: ModelRunner) -> list[int]:
    engine = Engine(runner)
    assert engine.core.add(SequenceSpec(1, PROMPT, SamplingParams(max_tokens=8)), 0.0) is None
    engine.run()
    return engine.answers[1]


@pytest.mark.parametrize("form", KEPT)
def test_the_weights_that_compute_are_those_that_come_out(tmp_path: Path, form: str) -> None:
    family, size, section, how = KEPT[form]
    packed, plain = made(tmp_path, family, size, section, how)
    small, large = runner_of(packed), runner_of(plain)
    assert "weights kept as they are stored" in small.describe_path()
    assert "unpacked" not in small.describe_path()
    torch.testing.assert_close(logits(small), logits(large), rtol=1e-4, atol=1e-4)
    assert tokens_of(small) == greedy(plain_model(plain), PROMPT, 8)
    assert small._quantized is not None
    assert not small._quantized.scales, "held beside those that are packed"
    projections = [w for name, w in load_file(plain / "model.safetensors").items() if name.endswith("_proj.weight")]
    if isinstance(small.forward, NativeStack):
        assert isinstance(large.forward, NativeStack)
        freed = large.forward.held_bytes - small.forward.held_bytes
        least = 3.3 if section.get("bits") == 4 or form == "packed" else 2.9  # of the 4 bytes that a weight takes
        assert freed > least * sum(weight.numel() for weight in projections)


def test_unpacked_and_kept_are_one_model(tmp_path: Path) -> None:
    """The same numbers and scales: workers of both kinds may serve together."""
    packed, plain = made(tmp_path, "Llama", RAGGED, FP8_BLOCKS, lambda weight: fp8(weight, 128))
    kept, unpacked = runner_of(packed), runner_of(packed, kernels="torch")
    assert kept.facts == unpacked.facts
    layouts = [KvLayout(f.identity, 8, f.groups, f.weights).fingerprint() for f in (kept.facts, unpacked.facts)]
    assert layouts[0] == layouts[1]
    assert "weights unpacked from fp8" in unpacked.describe_path()
    assert tokens_of(unpacked) == tokens_of(kept) == greedy(plain_model(plain), PROMPT, 8)
    again = runner_of(packed, quantization="int4")
    assert again.facts.identity != kept.facts.identity
    assert "int4 mlp weights, " in again.describe_path(), "rounded once more"
    assert "8 weights kept as they are stored" in again.describe_path()


def test_in_bfloat16_they_are_kept_as_well(tmp_path: Path) -> None:
    """A number is found again in a weight that was rounded to bfloat16."""
    packed, _ = made(tmp_path, "Llama", RAGGED, FP8_BLOCKS, lambda weight: fp8(weight, 128))
    small, large = runner_of(packed, dtype="bfloat16"), runner_of(packed, dtype="bfloat16", kernels="torch")
    assert "weights kept as they are stored" in small.describe_path()
    off = (logits(small).float() - logits(large).float()).square().mean().sqrt() / logits(large).float().std()
    assert off < 0.05


@pytest.mark.parametrize(
    ("section", "how"),
    [
        (of_gptq(4, 64, desc_act=True), gptq(4, 64, in_order=False)),
        (of_gptq(4, 128), gptq(4, 128, middle=5)),
        (of_gptq(4, 16), gptq(4, 16)),
    ],
    ids=["sorted columns", "a zero beside the middle", "groups of 16"],
)
def test_others_are_unpacked(tmp_path: Path, section: dict[str, Any], how: How) -> None:
    packed, plain = made(tmp_path, "Llama", SIZE | {"num_hidden_layers": 1}, section, how)
    runner = runner_of(packed)
    assert "weights unpacked from gptq, 4 bits" in runner.describe_path()
    assert tokens_of(runner) == greedy(plain_model(plain), PROMPT, 8)


def test_layers_that_are_packed_together_must_be_alike(tmp_path: Path) -> None:
    """One that the checkpoint left plain (modules_to_not_convert): those that share a product with it are unpacked."""
    packed, plain = made(tmp_path, "Llama", RAGGED, FP8_BLOCKS, lambda weight: fp8(weight, 128))
    stored, right = load_file(packed / "model.safetensors"), load_file(plain / "model.safetensors")
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        stored[name] = right[name].contiguous()
        del stored[f"{name}_scale_inv"]
    shutil.rmtree(tmp_path / "model")
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    runner = runner_of(packed)
    words = "10 weights kept as they are stored (fp8, blocks of 128 x 128), 2 unpacked (model.layers.*.self_attn.q_proj"
    assert words in runner.describe_path()
    assert tokens_of(runner) == greedy(plain_model(plain), PROMPT, 8)


def test_scales_of_blocks_are_a_grid() -> None:
    """Repeated where more share one, as float32 where bfloat16 has no such number; a zero is of zeros."""
    scales = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.1, 4.0]])

    class Numbers:
        def get_dtype(self) -> str:
            return "F8_E4M3"

    def grid(block: tuple[int, int], columns: int) -> Grid | None:
        return scales_of(Packed("scaled", {}, (3, columns), block=block), {"numbers": Numbers(), "scales": scales})

    found = grid((2, 256), 600)
    assert found is not None
    assert found.bits == FP8 | WIDE_SCALES
    assert torch.equal(found.scales, torch.tensor([[1, 1, 2, 2, 3.0]] * 2 + [[1, 1, 1.1, 1.1, 4]]))
    assert (small := grid((2, 64), 150)) is not None
    assert small.bits == of_groups(FP8, 64) | WIDE_SCALES
    assert (odd := grid((2, 96), 250)) is not None
    assert odd.bits == of_groups(FP8, 32) | WIDE_SCALES
    assert odd.scales.shape == (3, 8)
    assert grid((2, 80), 200) is None, "no width of kernels' groups fits"


def test_a_rank_has_its_part_of_the_grid() -> None:
    grid = Grid(torch.arange(24.0).view(6, 4), of_groups(8, 32))
    cut = grid.cut({0: [(0, 2), (4, 5)], 1: [(64, 128)]})
    assert cut is not None
    assert torch.equal(cut.scales, grid.scales[[0, 1, 4], 2:])
    assert grid.cut({1: [(16, 48)]}) is None, "a group over two ranks"


def test_numbers_with_zeros_are_not_taken_for_others() -> None:
    numbers, _, _ = in_groups(torch.randn(8, 128), 128, 4)
    assert numbers.min() == 0
    packed = Packed("packed", {"zeros": "x"}, (8, 128), 4, block=(1, 128), offset=8)
    assert scales_of(packed, {}) is None
