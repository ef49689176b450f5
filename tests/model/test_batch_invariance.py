"""Batch-invariant mode: the logits of a sequence are equal to the last bit, whatever else is computed and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engine import invariance_trial, invariant_linear
from engine.attention import invariant
from engine.attention.choose import AttentionShape
from engine.attention.interface import LATENT as LATENT_HEADS
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.invariance_trial import trial_of_invariance
from engine.invariant_linear import TILE_ROWS, NotInvariantError, make_linears_invariant, tiled_by_heads, tiled_linear
from engine.model_errors import ModelLoadError
from engine.native.build import ISA_VARIABLE
from engine.native.library import load_library
from engine.runner import ModelRunner
from engine.sampler import Drawn
from engine.scheduler import EngineLimits
from engine.types import PlanItem, SamplingParams, SequenceSpec
from tests.support import fixed_order
from tests.support.native_levels import EVERY_LEVEL
from tests.support.prompts import reference_greedy, tokens_of
from tests.support.runners import started
from tests.support.tiers import tiered

BLOCKS = 160
NEW_TOKENS = 3


@pytest.fixture(
    scope="module",
    params=tiered([("bfloat16", "torch"), ("float32", "native")], [(("float32", "torch"),), (("bfloat16", "native"),)]),
)
def runner(request: pytest.FixtureRequest, model_path: Path) -> ModelRunner:
    """The native stack is batch-invariant whether asked or not."""
    dtype, kernels = request.param
    config = {"model": str(model_path), "dtype": dtype, "num_blocks": BLOCKS, "threads": 1, "kernels": kernels}
    return started(config | {"batch_invariant": kernels == "torch"})


class Run:
    """Greedy answers of several sequences at once, with the logits of every sampled token."""

    def __init__(self, runner: ModelRunner, budget: int) -> None:
        self.runner = runner
        self.core = EngineCore(
            EngineLimits(32, budget, 16, 16, 8192, runner.facts.vocab_size), BlockPool(runner.num_blocks)
        )
        self.logits: dict[int, list[torch.Tensor]] = {}

    def add(self, number: int, prompt: list[int], **options: Any) -> None:
        sampling = SamplingParams(max_tokens=NEW_TOKENS)
        assert self.core.add(SequenceSpec(number, prompt, sampling, **options), 0.0) is None
        self.logits[number] = []

    def draw(self, logits: torch.Tensor, items: Sequence[PlanItem]) -> Drawn:
        for row, item in zip(logits, items, strict=True):
            self.logits[item.sequence_id].append(row.clone())
        return Drawn(len(items), logits.argmax(dim=-1), None)

    def step(self) -> bool:
        plan = self.core.schedule(0.0)
        if plan is None:
            return False
        self.runner._sampler = self  # type: ignore[assignment]
        self.core.commit(plan, self.runner.execute(plan), 0.0)
        return True

    def finish(self) -> dict[int, torch.Tensor]:
        while self.step():
            pass
        return {number: torch.stack(rows) for number, rows in self.logits.items()}


COMPANY = ((0, 37), (1, 64), (2, 257), (7, 100))  # how many others, and tokens a step
CASES = tiered([(75, COMPANY), (530, COMPANY[1:3])], [(1, COMPANY), (300, COMPANY), (530, (COMPANY[0], COMPANY[3]))])


@pytest.mark.parametrize(("length", "company"), CASES)
def test_batch_and_chunks_change_no_bit(
    runner: ModelRunner, tokenizer: Any, length: int, company: tuple[tuple[int, int], ...]
) -> None:
    prompt = tokens_of(tokenizer, length, seed=length)
    alone = Run(runner, 2048)
    alone.add(0, prompt)
    expected = alone.finish()[0]
    assert expected.shape == (NEW_TOKENS, runner.facts.vocab_size)
    for others, budget in company:
        run = Run(runner, budget)
        early = others // 2
        for n in range(early):
            run.add(10 + n, tokens_of(tokenizer, 5 + 13 * n, seed=n))
        if early:
            run.step()  # these decode while the prompt comes in
        run.add(0, prompt)
        for n in range(early, others):
            run.add(10 + n, tokens_of(tokenizer, 5 + 13 * n, seed=n))
        assert torch.equal(run.finish()[0], expected), f"{others} others, {budget} tokens a step"


def assert_each_gets_what_it_gets_alone(
    runner: ModelRunner, prompts: dict[int, list[int]], budget: int
) -> dict[int, torch.Tensor]:
    together = Run(runner, budget)
    for n, prompt in prompts.items():
        together.add(n, prompt)
    found = together.finish()
    for n, prompt in prompts.items():
        alone = Run(runner, 2048)
        alone.add(n, prompt)
        assert torch.equal(alone.finish()[n], found[n]), n
    return found


@pytest.mark.parametrize("count", tiered([4], [8]))
def test_each_gets_what_it_gets_alone(runner: ModelRunner, tokenizer: Any, count: int) -> None:
    prompts = {n: tokens_of(tokenizer, 3 + 17 * n, seed=50 + n) for n in range(count)}
    assert_each_gets_what_it_gets_alone(runner, prompts, 150)


def test_a_split_changes_no_bit(runner: ModelRunner, tokenizer: Any) -> None:
    """KV computed in small chunks beside others, moved to other blocks, decoded beside yet others."""
    prompt = tokens_of(tokenizer, 290, seed=5)
    alone = Run(runner, 2048)
    alone.add(0, prompt)
    expected = alone.finish()[0]

    run = Run(runner, 77)
    run.add(1, tokens_of(tokenizer, 40, seed=1))
    run.add(2, prompt, hand_over=True, retain=True)
    first = run.finish()[2]
    assert torch.equal(first[0], expected[0])
    run.add(3, tokens_of(tokenizer, 130, seed=3), cache_salt="another worker")
    run.add(4, prompt, hold=True, cache_salt="another worker")
    room = run.core.reserve(4, len(prompt), 0.0)
    assert room is not None
    for source, target in zip(run.core.block_table(2), room.block_ids, strict=True):
        runner.kv[target] = runner.kv[source]
    run.core.adopt(4, len(prompt), [int(first[0].argmax())], 0.0)
    assert torch.equal(run.finish()[4], expected[1:])


@pytest.mark.parametrize("dtype", tiered(["bfloat16"], ["float32"]))
def test_threads_change_no_bit_of_the_native_stack(model_path: Path, tokenizer: Any, dtype: str) -> None:
    config = {"model": str(model_path), "dtype": dtype, "num_blocks": BLOCKS, "threads": 1, "kernels": "native"}
    runner = ModelRunner(EngineConfig.model_validate(config))
    prompts = {n: tokens_of(tokenizer, 1 + 97 * n, seed=n) for n in range(4)}
    found = []
    for threads in (1, 3):
        load_library(threads)  # another team, for all of the process
        run = Run(runner, 128)
        for n, prompt in prompts.items():
            run.add(n, prompt)
        found.append(run.finish())
    load_library(1)
    for n in prompts:
        assert torch.equal(found[0][n], found[1][n]), n


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", tiered(["small"], ["embedded"]))
@EVERY_LEVEL
def test_every_instruction_set_is_invariant_and_exact(
    isa: str, kind: str, dtype: str, model_path: Path, small_model: Path, tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each went through the trial against transformers at its start; in float32 it gives transformers' tokens."""
    monkeypatch.setenv(ISA_VARIABLE, isa)
    model = small_model if kind == "small" else model_path
    config = {"model": str(model), "dtype": dtype, "num_blocks": BLOCKS, "threads": 1, "kernels": "native"}
    runner = ModelRunner(EngineConfig.model_validate(config))
    assert runner.forward.name == f"native stack ({isa})"
    prompts = {n: tokens_of(tokenizer, n, seed=n) for n in (3, 18)}
    found = assert_each_gets_what_it_gets_alone(runner, prompts, 16)
    if dtype == "float32":
        for n, prompt in prompts.items():
            assert found[n].argmax(-1).tolist() == reference_greedy(str(model), prompt, NEW_TOKENS), n


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_on_native_experts_is_invariant(tmp_path: Path, dtype: str) -> None:
    """Its routers go through in tiles, its experts are invariant as they are."""
    path = random_model(
        tmp_path, "Qwen3Moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16
    )
    settings = {"model": str(path), "dtype": dtype, "num_blocks": BLOCKS, "threads": 1, "batch_invariant": True}
    runner = started(settings)
    generator = torch.Generator().manual_seed(7)
    prompts = {n: torch.randint(3, 128, (3 + 17 * n,), generator=generator).tolist() for n in range(4)}
    assert_each_gets_what_it_gets_alone(runner, prompts, 30)
    with pytest.raises(ModelLoadError, match=r"batch-invariantly: .*experts"):
        ModelRunner(EngineConfig.model_validate(settings | {"kernels": "torch"}))


LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "dtype"),
    tiered([("Youtu", "bfloat16")], [("DeepseekV3", "float32"), ("Youtu", "float32"), ("DeepseekV3", "bfloat16")]),
)
def test_latent_attention_is_invariant(tmp_path: Path, family: str, dtype: str) -> None:
    """What stands around it is multiplied in tiles, too."""
    path = random_model(tmp_path, family, **LATENT, **(EXPERTS if family == "DeepseekV3" else {}))
    runner = started({"model": str(path), "dtype": dtype, "num_blocks": BLOCKS, "threads": 1, "batch_invariant": True})
    assert runner.facts.groups[0].kind == "latent"
    generator = torch.Generator().manual_seed(7)
    prompts = {n: torch.randint(3, 128, (3 + 17 * n,), generator=generator).tolist() for n in range(4)}
    assert_each_gets_what_it_gets_alone(runner, prompts, 30)


def random_model(directory: Path, family: str, **changes: Any) -> Path:
    import transformers

    torch.manual_seed(3)
    size = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**(size | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_give_each_row_its_own_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near torch's; to the last bit with a product of our own in its place, for torch's bits are the processor's."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 160, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype)
    x = torch.randn(3 * TILE_ROWS + 5, 160, generator=generator).to(dtype)
    near = tiled_linear(x[None], weight, bias)[0]
    assert torch.allclose(near, torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-2)
    monkeypatch.setattr(invariant_linear, "linear", fixed_order.linear)
    whole = tiled_linear(x[None], weight, bias)[0]
    assert torch.allclose(near, whole, atol=1e-4, rtol=1e-2)
    for start, stop in ((0, 1), (1, 4), (31, 33), (7, 71)):
        assert torch.equal(tiled_linear(x[start:stop], weight, bias), whole[start:stop])


def a_row_below_others_is_off(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As where the rows that do not fill a kernel's tile go through other code."""
    found = fixed_order.linear(x, weight, bias)
    found[-1] = found[-1].nextafter(torch.tensor(torch.inf))
    return found


def test_tiles_of_heads_give_each_row_its_own_product() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 20, 24, generator=generator)
    x = torch.randn(1, 3, TILE_ROWS + 5, 20, generator=generator)
    found = tiled_by_heads(x, weights)
    assert found.shape == (1, 3, TILE_ROWS + 5, 24)
    assert torch.allclose(found, x @ weights, atol=1e-5)


def test_the_trial_sees_heads_whose_rows_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Module()
    module.__dict__[LATENT_HEADS] = SimpleNamespace(weights=(torch.ones(2, 4, 3),))
    module.register_parameter("of", torch.nn.Parameter(torch.zeros(1)))
    monkeypatch.setattr(invariance_trial, "_trial_of_attention", lambda shape, device: None)
    shape = AttentionShape(heads=4, kv_heads=1, head_dim=16, block_tokens=32, dtype=torch.float32)
    monkeypatch.setattr(invariance_trial, "tiled_by_heads", lambda x, w: x @ w + x.shape[2])
    assert "surrounds latent attention [2, 4, 3] depends on its place" in str(trial_of_invariance(module, shape))


def test_where_the_machines_libraries_are_not_invariant_the_trial_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8, bias=False))
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=16, block_tokens=32, dtype=torch.float32)
    monkeypatch.setattr(invariant_linear, "linear", fixed_order.linear)
    monkeypatch.setattr(invariance_trial, "_trial_of_attention", lambda shape, device: "attention differs")
    assert trial_of_invariance(model, shape) == "attention differs", "and no product did"
    monkeypatch.setattr(invariant_linear, "linear", a_row_below_others_is_off)
    assert "a weight of [40, 24] depends on its place" in str(trial_of_invariance(model, shape))


def test_the_trial_sees_attention_that_depends_on_the_chunk_or_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=16, block_tokens=32, dtype=torch.float32)
    rows_of_one, batches_of_one = 0.0, 0.0

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        """Sees each query alone and no length: bits that depend on nothing, but for what is planted."""
        chunk, batch = q.shape[2] == 40, q.shape[2] == 8 and len(q) == 1 and q.shape[1] == shape.kv_heads
        return q * 2 + (rows_of_one if chunk else batches_of_one if batch else 0.0)

    monkeypatch.setattr(invariant, "sdpa", attention)
    linear = torch.nn.Identity()
    linear.register_parameter("of", torch.nn.Parameter(torch.zeros(1)))
    assert trial_of_invariance(linear, shape) is None
    rows_of_one = 1e-6
    assert "chunk of 37 tokens differs" in str(trial_of_invariance(linear, shape))
    rows_of_one, batches_of_one = 0.0, 1e-6
    assert "depends on the batch" in str(trial_of_invariance(linear, shape))


def test_a_model_with_other_products_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Conv1d(2, 2, 1))
    with pytest.raises(NotInvariantError, match="1 \\(Conv1d\\)"):
        make_linears_invariant(model)


def test_blocks_that_do_not_fill_a_key_tile_are_refused() -> None:
    with pytest.raises(ValidationError, match="divide 512"):
        EngineConfig(batch_invariant=True, block_tokens=48)
