"""Latent attention (MLA) in every family that has it: exact, and no more is kept than the latent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention.interface import Chunk
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.model_loader import ModelLoadError
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec
from kv_transfer.layout import Rule
from tests.model.test_families import greedy, saved
from tests.model.test_text_part import assert_exact
from tests.model.test_text_part import saved as saved_whole

LATENT, ROTARY = 24, 8
NEW = 9  # tokens of an answer, over the border of a block
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": LATENT,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": ROTARY,
    "v_head_dim": 10,
    "initializer_range": 0.2,  # with less, answers repeat one token
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0,
    "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
TOP = 96
INDEXER = {"index_topk": TOP, "index_n_heads": 2, "index_head_dim": 16, "num_hidden_layers": 3}
MISTRAL4 = {"model_type": "mistral4", "head_dim": 20}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepseekV2": ("DeepseekV2", EXPERTS | {"topk_method": "group_limited_greedy"}),
    "DeepseekV2 without q_lora": ("DeepseekV2", {"q_lora_rank": None, "first_k_dense_replace": 2}),
    "DeepseekV3": ("DeepseekV3", EXPERTS),
    "DeepseekV3 with yarn": ("DeepseekV3", EXPERTS | {"rope_parameters": YARN}),
    "DeepseekV3 in halves": ("DeepseekV3", EXPERTS | {"rope_interleave": False, "attention_bias": True}),
    "Glm4MoeLite": ("Glm4MoeLite", EXPERTS | {"mlp_layer_types": ["dense", "sparse"]}),
    "Youtu": ("Youtu", {}),
    "MiniCPM3": ("MiniCPM3", {}),
    "AXK1": ("AXK1", EXPERTS),
    "LongcatFlash": (
        "LongcatFlash",
        {"num_layers": 1, "head_dim": ROTARY, "ffn_hidden_size": 96, "moe_topk": 3, "n_routed_experts": 4,
         "zero_expert_num": 2, "expert_ffn_hidden_size": 16},
    ),
    "DeepseekV32": ("DeepseekV32", EXPERTS | INDEXER),
    "GlmMoeDsa": ("GlmMoeDsa", EXPERTS | INDEXER | {"indexer_types": ["full", "shared", "shared"]}),
    "AXK2": ("AXK2", EXPERTS | INDEXER),
    "HYV4": ("HYV4", EXPERTS | INDEXER),
    "Dots3Note": (  # some layers have a window and a latent of another width
        "Dots3NoteText",
        EXPERTS | INDEXER | {
            "layer_types": ["indexed_attention", "sliding_attention", "full_attention"], "use_dsa": None,
            "sliding_window": 16, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 20,
            "swa_kv_lora_rank": 16, "swa_head_dim": 20, "swa_qk_nope_head_dim": 12, "swa_v_head_dim": 10,
        },
    ),
}  # fmt: skip


def started(path: Path, **changes: Any) -> ModelRunner:
    config = {"model": str(path), "dtype": "float32", "num_blocks": 64, "block_tokens": 8, "threads": 1}
    return ModelRunner(EngineConfig.model_validate(config | changes))


def answered(runner: ModelRunner, core: EngineCore, prompts: dict[int, list[int]]) -> dict[int, tuple[list[int], int]]:
    """Greedy answers, and how many tokens of each prompt were cached."""
    answers: dict[int, list[int]] = {n: [] for n in prompts}
    cached: dict[int, int] = {}
    for n, prompt in prompts.items():
        assert core.add(SequenceSpec(n, prompt, SamplingParams(max_tokens=NEW)), 0.0) is None
    while (plan := core.schedule(0.0)) is not None:
        events = core.commit(plan, runner.execute(plan), 0.0)
        for token in events.tokens:
            answers[token.sequence_id].append(token.token_id)
        cached |= {end.sequence_id: end.cached_tokens for end in events.ends}
    core.check()
    return {n: (answers[n], cached[n]) for n in prompts}


@pytest.mark.parametrize("case", FAMILIES)
def test_families_of_latent_attention_are_exact(tmp_path: Path, case: str) -> None:
    """Prompts cut into chunks beside each other's decodes, over the borders of blocks, and again from the cache."""
    family, changes = FAMILIES[case]
    path = saved(tmp_path, family, **(MLA | changes))
    limit = changes.get("index_topk", 256)
    runner = started(path, context_limit_tokens=limit)
    kept, *others = runner.facts.groups
    assert kept.rule == Rule(values=LATENT)
    assert kept.token_bytes == (LATENT + ROTARY) * len(kept.layers) * 4
    assert runner.kv[0].nbytes == 64 * 8 * kept.token_bytes
    assert [(group.kind, group.rule.window) for group in others] == ([("latent", 16)] if case == "Dots3Note" else [])

    limits = EngineLimits(8, 20, 8, 8, limit, runner.facts.vocab_size)
    core = EngineCore(limits, BlockPool(runner.num_blocks), rules=[group.rule for group in runner.facts.groups])
    generator = torch.Generator().manual_seed(1)
    prompts = {n: torch.randint(3, 128, (n,), generator=generator).tolist() for n in (1, 7, 30, 53)}
    expected = {n: greedy(path, prompt, NEW) for n, prompt in prompts.items()}
    first = answered(runner, core, prompts)
    assert {n: tokens for n, (tokens, _) in first.items()} == expected
    assert len({tuple(answer) for answer in expected.values()}) == len(prompts)
    assert answered(runner, core, {53: prompts[53]}) == {53: (expected[53], 48)}


@pytest.mark.parametrize(("published", "text"), [("kimi_k25", {}), ("mistral3", MISTRAL4)])
def test_latent_attention_beside_what_sees(tmp_path: Path, published: str, text: dict[str, Any]) -> None:
    """Mistral 4 scales its queries by position, and has no model for its text alone."""
    runner = assert_exact(saved_whole(tmp_path, published, {"text_config": MLA | text}))
    assert [group.rule for group in runner.facts.groups] == [Rule(values=LATENT)]


@pytest.mark.parametrize("family", ["DeepseekV32", "GlmMoeDsa"])
def test_tokens_picked_by_an_indexer_are_refused_beyond_its_number(tmp_path: Path, family: str) -> None:
    path = saved(tmp_path, family, **(MLA | EXPERTS | INDEXER))
    with pytest.raises(ModelLoadError, match=rf"sparse attention.*context_limit_tokens to at most {TOP}$"):
        started(path)


def test_a_latent_that_no_module_is_known_for_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, "Llama")
    described = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(described | {"kv_lora_rank": 16}))
    with pytest.raises(ModelLoadError, match="latent attention of a form that is not known"):
        started(path)


def test_logits_in_bfloat16_are_as_near_to_float32_as_transformers(tmp_path: Path) -> None:
    """Absorbed products round elsewhere than expanded ones, and no worse."""
    from transformers import AutoModelForCausalLM

    sizes = {"kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "q_lora_rank": 96}
    path = saved(tmp_path, "Youtu", **(MLA | sizes | {"num_hidden_layers": 4, "initializer_range": 0.1}))
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    plain.save_pretrained(path)
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    runner = started(path, dtype="bfloat16")
    tokens = torch.randint(3, 128, (120,), generator=torch.Generator().manual_seed(1))
    positions, blocks = list(range(120)), list(range(15))
    with torch.inference_mode():
        expected = exact(tokens[None]).logits[0]
        theirs = plain(tokens[None]).logits[0].float()
        parts = []
        for start, end in [(0, 50), (50, 100), *((n, n + 1) for n in range(100, 120))]:
            chunk = Chunk(0, end - start, start, blocks)
            new = tokens[start:end].tolist()
            parts.append(runner.forward.forward(runner.kv, new, positions[start:end], [chunk], range(end - start)))
        ours = torch.cat(parts).float().cpu()
    off, their_off = ((logits - expected).square().mean().sqrt() / expected.std() for logits in (ours, theirs))
    assert off < 1.5 * their_off < 0.2
    print(f"rms {off:.4f} of the deviation, transformers {their_off:.4f}")
