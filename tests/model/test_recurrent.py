"""Models with recurrent layers: whatever way the engine takes through a prompt, it computes what transformers does.

Tiny random models. A `Walk` hands steps to the model as an engine would, with block tables and slots of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.attention.interface import Chunk, StateUse
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.model_loader import ModelLoadError
from engine.native.build import NativeBuildError, built_library
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec
from tests.model.test_families import SIZE, greedy
from tests.support.prompts import clear_choice

BLOCK, BLOCKS = 4, 64
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
AROUND = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
}  # fmt: skip
CONV = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Next": DELTA | EXPERTS | AROUND | {"head_dim": 32, "shared_expert_intermediate_size": 32},
    "Qwen3_5Text": DELTA | AROUND | {"head_dim": 32},
    "GraniteMoeHybrid": MAMBA | {
        "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0,
        "shared_intermediate_size": 64,
    },
    "FalconH1": MAMBA | {"mamba_d_ssm": 128},
    "Lfm2": CONV | {"block_multiple_of": 16},
    "Lfm2Moe": CONV | EXPERTS | {"num_dense_layers": 1},
    "NemotronH": {
        "num_hidden_layers": 5, "layers_block_type": ["mamba", "attention", "mlp", "moe", "mamba"], "chunk_size": 8,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "Bamba": MAMBA | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "Jamba": {
        "num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4,
        "num_experts_per_tok": 2, "mamba_d_state": 16, "mamba_dt_rank": 8,
    },
    "OlmoHybrid": DELTA | AROUND,
    "KimiLinear": AROUND | LATENT | {"linear_head_dim": 16, "linear_num_heads": 4},
    "BailingHybrid": AROUND | LATENT | {"head_dim": 16, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "MiniMax": AROUND | {"num_local_experts": 4, "head_dim": 16, "block_size": 8},
    "Zaya": {"head_dim": 16, "num_query_groups": 2, "num_experts": 4},
    "Zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 16,
        "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1,
    },
    "Mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    "FalconMamba": {"state_size": 16},
}  # fmt: skip
TOKEN_BY_TOKEN = {"Jamba", "FalconMamba"}  # their scan does not look at a state: see engine/recurrent.py
NOT_PACKED = {"MiniMax", "Zaya"}  # no kernel does what they do
KERNELS = pytest.mark.parametrize("kernels", ["auto", "torch"])  # over the packed row, or piece by piece


def saved(path: Path, family: str, changes: dict[str, Any]) -> Path:
    """Weights wide enough that states and attention matter."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{family}Config")(**(SIZE | changes)), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and "embed" not in name and "A_log" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 1.6 / p.shape[-1] ** 0.5)
    model.save_pretrained(path)
    return path


def loaded(path: Path, **settings: Any) -> ModelRunner:
    settings = {"dtype": "float32", "num_blocks": BLOCKS, "block_tokens": BLOCK, "threads": 1} | settings
    return ModelRunner(EngineConfig(model=str(path), context_limit_tokens=256, **settings))


@dataclass
class Walked:
    """A sequence: its block table, its two slots, and where it stands."""

    tokens: list[int]
    table: list[int]
    slots: tuple[int, int]
    done: int = 0
    source: int = -1


class Walk:
    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.groups = runner.facts.groups
        blocks = [8 if group.rule.state else BLOCKS for group in self.groups]
        self.pools = runner.shape.pool(blocks, runner.device)
        self.pools[-1].fill_(255)  # a state that nobody wrote is seen when it is read

    def step(self, *items: tuple[Walked, int], snapshot: tuple[int, int] = (0, -1)) -> list[torch.Tensor]:
        """Logits of each item's new tokens; every item takes the snapshot, or none. Nothing has moved yet."""
        tokens, positions, chunks = [], [], []
        for one, count in items:
            end = one.done + count
            target = next(slot for slot in one.slots if slot != one.source)
            others = tuple([] if group.rule.state else one.table for group in self.groups[1:])
            use = StateUse(one.source, target, *snapshot)
            chunks.append(Chunk(len(tokens), count, one.done, one.table, others, use))
            tokens += one.tokens[one.done : end]
            positions += range(one.done, end)
        assert len(tokens) == sum(count for _, count in items), "a sequence is at its end"
        with torch.inference_mode():
            logits = self.runner.forward.forward(self.pools, tokens, positions, chunks, range(len(tokens)))
        return list(logits.split([count for _, count in items]))

    def go(self, *items: tuple[Walked, int], snapshot: tuple[int, int] = (0, -1)) -> list[torch.Tensor]:
        answers = self.step(*items, snapshot=snapshot)
        for one, count in items:
            one.done += count
            one.source = next(slot for slot in one.slots if slot != one.source)
        return answers


@contextmanager
def walking(path: Path, family: str, kernels: str) -> Iterator[tuple[Walk, Any]]:
    runner = loaded(saved(path, family, FAMILIES[family]), kernels=kernels)
    yield Walk(runner), transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def compiled() -> bool:
    try:
        built_library()
    except NativeBuildError:
        return False
    return True


def expected(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def same(ours: list[torch.Tensor], theirs: torch.Tensor) -> None:
    """Of all tokens of a sequence: the logits, and so the tokens chosen, wherever the choice is clear."""
    found = torch.cat(ours)
    assert (found - theirs).abs().max() < 1e-3 * theirs.std()
    assert [clear_choice(row) for row in found] == [clear_choice(row) for row in theirs]


@KERNELS
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_through_a_prompt_is_exact(tmp_path: Path, family: str, kernels: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def random(count: int) -> list[int]:
        return torch.randint(3, 128, (count,), generator=generator).tolist()

    with walking(tmp_path, family, kernels) as (walk, model):
        first = Walked(random(24), [9, 1, 5, 3, 7, 2], (0, 1))
        second = Walked(random(9), [20, 22, 21], (3, 2))
        third = Walked(random(3), [30], (4, 5))
        a = walk.go((first, 5))  # odd pieces, and a prompt beside them
        b, c = [], []
        for counts in ((3, 0, 0), (7, 2, 0), (1, 5, 1), (3, 0, 1), (1, 1, 1), (2, 1, 0), (1, 0, 0), (1, 0, 0)):
            items = [(one, n) for one, n in zip((first, second, third), counts, strict=True) if n]
            items.sort(key=lambda item: item[1] > 1)  # decodes first
            for (one, _), answer in zip(items, walk.go(*items), strict=True):
                (a if one is first else b if one is second else c).append(answer)
        for one, answers in ((first, a), (second, b), (third, c)):
            same(answers, expected(model, one.tokens))

        # A snapshot after the second block; the step is repeated; another sequence goes on from the snapshot.
        whole = Walked(random(14), [40, 41, 42, 43], (0, 1))
        theirs = expected(model, whole.tokens)
        walk.step((whole, 12), snapshot=(8, 6))
        answers = walk.go((whole, 12), snapshot=(8, 6))
        walk.step((whole, 1))
        same([*answers, *walk.go((whole, 1)), *walk.go((whole, 1))], theirs)
        branch = Walked(whole.tokens[:8] + random(6), [40, 41, 50, 51], (2, 3), 8, 6)
        own = expected(model, branch.tokens)
        parts = [*walk.go((branch, 4)), *walk.go((branch, 1), snapshot=(1, 7)), *walk.go((branch, 1))]
        same(parts, own[8:])
        again = Walked(branch.tokens, branch.table, (4, 5), 13, 7)  # from a snapshot that a decode left
        same(walk.go((again, 1)), own[13:])

        mixers = walk.runner.forward._recurrence.mixers  # type: ignore[attr-defined]
        assert {m.reads_state_in_chunks for m in mixers} == {family not in TOKEN_BY_TOKEN}
        assert {m.packed is not None for m in mixers} == {kernels == "auto" and compiled() and family not in NOT_PACKED}


@pytest.mark.parametrize("family", ["Qwen3_5Text", "NemotronH", "Jamba", "MiniMax", "Zaya"])
def test_pieces_of_equal_length_run_together(tmp_path: Path, family: str) -> None:
    """By the mixers' own code: the prompts of a step in one call, and in another what goes on behind a state."""
    generator = torch.Generator().manual_seed(2)
    with walking(tmp_path, family, "torch") as (walk, model):
        sequences = [
            Walked(torch.randint(3, 128, (12,), generator=generator).tolist(), [8 * n, 8 * n + 1, 8 * n + 2], slots)
            for n, slots in enumerate([(0, 1), (2, 3), (4, 5)])
        ]
        mixer = walk.runner.forward._recurrence.mixers[0]  # type: ignore[attr-defined]
        calls: list[tuple[int, ...]] = []
        own = mixer._inner

        def counted(*args: Any, **kwargs: Any) -> Any:
            given = next(value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor))
            calls.append(tuple(given.shape[:2]))
            return own(*args, **kwargs)

        mixer._inner = counted
        a, b, c = sequences
        answers: dict[int, list[torch.Tensor]] = {id(one): [] for one in sequences}
        for items in ([(a, 5), (b, 5)], [(a, 1), (b, 3), (c, 5)], [(b, 1), (a, 3), (c, 3)], [(a, 3), (b, 3), (c, 4)]):
            for (one, _), answer in zip(items, walk.go(*items), strict=True):
                answers[id(one)].append(answer)
        if family not in TOKEN_BY_TOKEN:
            assert calls == [(2, 5), (1, 1), (1, 3), (1, 5), (1, 1), (2, 3), (2, 3), (1, 4)]
        for one in sequences:
            same(answers[id(one)], expected(model, one.tokens))


@pytest.mark.parametrize("family", ["Qwen3_5Text", "NemotronH", "Jamba", "Mamba2"])
def test_an_engine_serves_them_and_begins_where_a_prompt_is_known(tmp_path: Path, family: str) -> None:
    runner = loaded(saved(tmp_path, family, FAMILIES[family]))
    pool = BlockPool(runner.num_blocks)
    limits = EngineLimits(BLOCK, 20, 8, 8, 256, runner.facts.vocab_size)
    core = EngineCore(limits, pool, rules=[group.rule for group in runner.facts.groups])
    generator = torch.Generator().manual_seed(1)
    known = torch.randint(3, 128, (30,), generator=generator).tolist()
    waves = [[known, known[:7], [5]], [[*known, 9, 8], known[:16] + known[3:9], known]]
    answers: dict[int, list[int]] = {}
    prompts: dict[int, list[int]] = {}
    for wave in waves:
        for prompt in wave:
            number = len(prompts)
            prompts[number], answers[number] = prompt, []
            assert core.add(SequenceSpec(number, prompt, SamplingParams(max_tokens=6)), 0.0) is None
        cached = 0
        while (plan := core.schedule(0.0)) is not None:
            step = core.commit(plan, runner.execute(plan), 0.0)
            cached += sum(end.cached_tokens for end in step.ends)
            for token in step.tokens:
                answers[token.sequence_id].append(token.token_id)
    core.check()
    assert core.is_idle()
    assert cached >= len(known) // BLOCK * BLOCK, "the second wave begins with what the first left"
    for number, prompt in prompts.items():
        assert answers[number] == greedy(tmp_path, prompt, 6), f"{family}, prompt {number}"


def test_states_are_kept_in_the_type_of_the_mixer(tmp_path: Path) -> None:
    """A bfloat16 model's recurrent state is float32, as in transformers' cache."""
    runner = loaded(saved(tmp_path, "Qwen3Next", FAMILIES["Qwen3Next"]), dtype="bfloat16")
    mixer = runner.forward._recurrence.mixers[0]  # type: ignore[attr-defined]
    kept = {kind: (field.shape, field.dtype) for (kind, _), field in mixer.fields.items()}
    assert kept == {"convolution": ((128, 4), torch.bfloat16), "recurrent": ((4, 16, 16), torch.float32)}
    state = runner.facts.groups[-1]
    assert state.layers == (0, 2)
    assert state.width == 2 * (128 * 4 * 2 + 4 * 16 * 16 * 4)
    assert state.dtype == "uint8"


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("RecurrentGemma", {"num_hidden_layers": 3}, "layer 0 .* keeps what transformers' cache does not show"),
        ("Rwkv", {}, "none of its layers calls attention"),
    ],
)
def test_states_kept_elsewhere_are_refused(tmp_path: Path, family: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        loaded(saved(tmp_path, family, changes))


def test_batch_invariance_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"recurrent layers, .* set engine\.batch_invariant to false"):
        loaded(saved(tmp_path, "Lfm2", FAMILIES["Lfm2"]), batch_invariant=True)
