"""What the trial at start sees over the whole context: models that look at positions, batches or rows in their own
ways, and wrong computations that are planted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.attention.gather import GatherBackend
from engine.attention.interface import ATTENTION_NAME, register
from engine.config import EngineConfig
from engine.forward import TorchForward
from engine.model_loader import ModelLoadError
from engine.position_trial import disagreement, named_lengths, take_reference
from engine.runner import ModelRunner

ORIGINAL, LIMIT = 256, 1024
SIZE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": LIMIT, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
    "long_factor": [2 + i / 4 for i in range(8)], "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip


def spread(model: Any) -> Any:
    """Weights wide enough that attention is peaked; biases and norms are not what they begin as."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            wide = p.dim() >= 2 and "embed" not in name
            p.copy_(torch.randn(p.shape, generator=generator) * (1.6 / p.shape[-1] ** 0.5 if wide else 1.0))
    return model


def saved(path: Path, config: Any) -> Path:
    spread(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(path)
    return path


def loaded(path: Path, **settings: Any) -> ModelRunner:
    return ModelRunner(EngineConfig(model=str(path), dtype="float32", num_blocks=8, threads=1, **settings))


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.Phi3Config(
        **SIZE, sliding_window=None, rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL
    )
    return saved(tmp_path_factory.mktemp("longrope"), config)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_angles_by_the_longest_of_a_batch_are_refused_with_the_limit_that_serves(longrope: Path, kernels: Any) -> None:
    with pytest.raises(ModelLoadError, match=f"context_limit_tokens to at most {ORIGINAL}$"):
        loaded(longrope, kernels=kernels)
    assert loaded(longrope, kernels=kernels, context_limit_tokens=ORIGINAL).facts.context_limit_tokens == ORIGINAL


def test_queries_scaled_by_position_run_where_they_are_scaled(tmp_path: Path) -> None:
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
        "llama_4_scaling_beta": 0.1,
    }  # fmt: skip
    path = saved(tmp_path, transformers.Ministral3Config(**SIZE, sliding_window=None, rope_parameters=rope))
    assert "native stack" not in loaded(path).forward.name


def test_positions_counted_from_the_packed_row_are_refused(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        **SIZE, intermediate_size_mlp=96, num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=10,
        layer_types=["full_attention"] * 3, no_rope_layers=[1, 1, 0], attn_temperature_tuning=True,
        floor_scale=ORIGINAL,
    )  # fmt: skip
    with pytest.raises(ModelLoadError, match="computed wrongly: at positions"):
        loaded(saved(tmp_path, config))


def forget_a_bias(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.bias.zero_()


def forget_a_norm(model: Any) -> None:
    model.model.layers[2].post_attention_layernorm.weight.fill_(1.0)


def another_scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 1.1


def another_theta(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 0.999  # seen far from the beginning only


def positions_of_the_row(model: Any) -> None:
    inner = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: inner(x, torch.arange(x.shape[1])[None])


def nothing(model: Any) -> None:
    pass


COARSE, FINE = (forget_a_bias, forget_a_norm, positions_of_the_row), (another_scale, another_theta)


@pytest.mark.parametrize(
    ("plant", "dtype"),
    [*((p, torch.float32) for p in (*COARSE, *FINE)), *((p, torch.bfloat16) for p in COARSE)],  # the rest is rounding
)
def test_a_planted_fault_is_seen(plant: Callable[[Any], None], dtype: torch.dtype) -> None:
    register()
    config = transformers.Qwen2Config(**SIZE)
    right = spread(transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME))
    right = right.to(dtype).eval()
    reference = take_reference(right, config.to_dict(), dtype, LIMIT)
    shape = (3, 2, 2, 16, 16)
    for change, seen in ((nothing, False), (plant, True)):
        model = copy.deepcopy(right)
        with torch.no_grad():
            change(model)
        forward = TorchForward(model, GatherBackend())
        assert bool(disagreement(forward, reference, shape, dtype, torch.device("cpu"))) is seen


def test_lengths_are_found_wherever_they_stand() -> None:
    described = {
        "max_position_embeddings": 4096, "hidden_size": 512, "floor_scale": 100, "rms_norm_eps": 1e-5,
        "rope_parameters": {"original_max_position_embeddings": 1024.0, "factor": 4.0, "scaling": True},
        "text_config": {"sliding_window": 300, "attention_chunk_size": 8},
    }  # fmt: skip
    assert named_lengths(described, 4096) == [100, 300, 1024]
