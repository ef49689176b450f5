"""Tiny random models of the families that people serve: exact where supported, refused with the reason where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.model_loader import ModelLoadError
from engine.native.build import ISA_VARIABLE, NativeBuildError, built_library
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec
from tests.support.native_levels import EVERY_LEVEL
from tests.support.prompts import clear_choice

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
SIZE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def saved(tmp_path: Path, family: str, **changes: Any) -> Path:
    """A checkpoint of random weights."""
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**(SIZE | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    return tmp_path


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(clear_choice(model(torch.tensor([ids])).logits[0, -1]))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("family", "changes", "native"),
    [
        ("Llama", {}, "stack"),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_size": 72, "intermediate_size": 102}, "stack"),
        ("Llama", {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True, "vocab_size": 131}, "stack"),
        ("Mistral", {"sliding_window": None}, "stack"),
        ("Qwen2", {}, "stack"),
        ("Qwen3", {"head_dim": 32}, "stack"),
        (
            "Qwen3Moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
            "paged",
        ),
        ("Phi3", {"rope_scaling": None}, "paged"),
        ("Gemma", {"head_dim": 32}, "paged"),
        ("Olmo2", {}, "paged"),
        ("Granite", {"residual_multiplier": 0.5, "embedding_multiplier": 3.0}, "paged"),
        ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, "paged"),
        ("GPTBigCode", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, "paged"),
        ("StableLm", {"use_qkv_bias": True}, "paged"),  # layers that keep from attention what the model is called with
        ("Nemotron", {"head_dim": 16}, "paged"),
    ],
)
def test_supported_families_are_exact(tmp_path: Path, family: str, changes: dict[str, Any], native: str) -> None:
    """`native`: whether the whole model runs on native kernels, or its attention."""
    path = saved(tmp_path, family, **changes)
    runner = ModelRunner(EngineConfig(model=str(path), dtype="float32", num_blocks=32, block_tokens=8, threads=1))
    assert runner.forward.name.startswith(f"native {native}") or torch.cuda.is_available()
    core = EngineCore(EngineLimits(8, 20, 8, 8, 256, runner.facts.vocab_size), BlockPool(32))
    generator = torch.Generator().manual_seed(1)
    prompts = {n: torch.randint(3, 128, (n,), generator=generator).tolist() for n in (1, 7, 30)}
    answers: dict[int, list[int]] = {n: [] for n in prompts}
    for n, prompt in prompts.items():
        assert core.add(SequenceSpec(n, prompt, SamplingParams(max_tokens=6)), 0.0) is None
    while (plan := core.schedule(0.0)) is not None:
        for token in core.commit(plan, runner.execute(plan), 0.0).tokens:
            answers[token.sequence_id].append(token.token_id)
    for n, prompt in prompts.items():
        assert answers[n] == greedy(path, prompt, 6), f"{family}, {n} tokens"


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("Bloom", {"n_head": 4, "n_layer": 2}, "code of its own"),
        ("GPTJ", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, "from a list of its own"),
        ("Bart", {"d_model": 64, "decoder_layers": 2, "encoder_layers": 2}, "the decoder of an encoder-decoder model"),
        ("Mistral", {"sliding_window": 0}, "not a piece that ends with itself"),
        ("Mistral", {"sliding_window": 1}, "a window of one token"),
        ("Xmod", {}, r"does not run on tokens alone \(Input language unknown"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], words: str
) -> None:
    path = saved(tmp_path, family, **changes)
    with pytest.raises(ModelLoadError, match=words):
        ModelRunner(EngineConfig(model=str(path), dtype="float32", num_blocks=8, threads=1))


def test_a_window_that_the_context_never_leaves_is_full_attention(tmp_path: Path) -> None:
    path = saved(tmp_path, "Mistral", sliding_window=64)
    runner = ModelRunner(
        EngineConfig(model=str(path), dtype="float32", num_blocks=8, threads=1, context_limit_tokens=64)
    )
    assert runner.facts.context_limit_tokens == 64


def test_a_limit_above_the_models_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, "Llama")
    with pytest.raises(ModelLoadError, match="the model's limit is 256"):
        ModelRunner(EngineConfig(model=str(path), context_limit_tokens=512))


@pytest.mark.parametrize("model", ["/no/such/place", "./nowhere", "a/b/c"])
def test_a_wrong_path_is_named(model: str) -> None:
    with pytest.raises(ModelLoadError, match="there is no model at"):
        ModelRunner(EngineConfig(model=model))


def test_a_directory_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        ModelRunner(EngineConfig(model=str(tmp_path)))


def test_cuda_without_cuda_is_named(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ModelLoadError, match="no CUDA device"):
        ModelRunner(EngineConfig(model=str(saved(tmp_path, "Llama")), device="cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="native kernels are of the CPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@EVERY_LEVEL
def test_native_stack_with_odd_sizes(isa: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial at start is the assertion: the stack is refused where it disagrees with transformers."""
    monkeypatch.setenv(ISA_VARIABLE, isa)
    path = saved(tmp_path, "Llama", hidden_size=72, intermediate_size=101, vocab_size=131, attention_bias=True)
    config = {"model": str(path), "dtype": dtype, "num_blocks": 8, "threads": 2, "kernels": "native"}
    assert ModelRunner(EngineConfig.model_validate(config)).forward.name == f"native stack ({isa})"


def test_without_a_compiler_torch_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, "Llama")
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = EngineConfig(model=str(path), dtype="float32", num_blocks=8, threads=1, device="cpu")
    assert ModelRunner(config).forward.name == "torch gather + sdpa"
    with pytest.raises(ModelLoadError, match=r"kernels is native, and there is no C\+\+ compiler \(no-such-compiler"):
        ModelRunner(config.model_copy(update={"kernels": "native"}))


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'x.h:1: error: nonsense' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path / "home"))
    with pytest.raises(NativeBuildError, match=r"cannot compile the kernels: x\.h:1: error: nonsense"):
        built_library()
