"""LoRA adapters: many in one batch, each answer that of the model with its adapter merged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine.adapters.format import Adapter, read_adapter, read_again
from engine.adapters.layers import AdapterLayers
from engine.adapters.slots import AdapterSlots, InSlot
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.model_errors import AdapterError
from engine.model_loader import ModelLoadError
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceEnded, SequenceSpec
from kv_transfer.block_hash import root_hash
from tests.model.test_families import saved
from tests.support.adapters import merged_model, plain_model, saved_adapter
from tests.support.prompts import clear_choice
from worker.repeat import repeat

BLOCK = 8
ANSWER = 6


def runner_of(
    path: Path, adapters: dict[str, Path], slots: int = 2, live: dict[str, Any] | None = None, **settings: Any
) -> ModelRunner:
    """`live`: further settings of adapters."""
    small = {"model": str(path), "dtype": "float32", "num_blocks": 96, "block_tokens": BLOCK, "threads": 1}
    given = {"models": {name: str(at) for name, at in adapters.items()}, "slots": slots} | (live or {})
    return ModelRunner(EngineConfig.model_validate({**small, "device": "cpu", "adapters": given, **settings}))


class Engine:
    """With prompts of 20 tokens a step, so that long ones are cut."""

    def __init__(self, runner: ModelRunner, slots: int = 2, root: str = "") -> None:
        self.runner = runner
        self.adapters = AdapterSlots(slots, (adapter.digest for adapter in runner.adapters))
        limits = EngineLimits(BLOCK, 20, 12, 64, 256, runner.facts.vocab_size)
        rules = tuple(group.rule for group in runner.facts.groups)
        self.core = EngineCore(limits, BlockPool(runner.num_blocks), root, rules=rules, adapters=self.adapters)
        self.answers: dict[int, list[int]] = {}
        self.ends: dict[int, SequenceEnded] = {}

    def digest(self, name: str) -> str:
        return next((a.digest for a in self.runner.adapters if a.name == name), "")

    def ask(self, number: int, prompt: list[int], adapter: str = "", count: int = ANSWER) -> None:
        spec = SequenceSpec(number, prompt, SamplingParams(max_tokens=count), adapter=self.digest(adapter))
        assert self.core.add(spec, 0.0) is None

    def run(self) -> int:
        """The most adapters that a step had."""
        most = 0
        while (plan := self.core.schedule(0.0)) is not None:
            most = max(most, len({item.adapter for item in plan.items if item.adapter is not None}))
            events = self.core.commit(plan, self.runner.execute(plan), 0.0)
            for token in events.tokens:
                self.answers.setdefault(token.sequence_id, []).append(token.token_id)
            self.ends |= {end.sequence_id: end for end in events.ends}
            self.core.check()
        return most


def greedy(model: Any, prompt: list[int], count: int = ANSWER) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(clear_choice(model(torch.tensor([ids])).logits[0, -1]))
    return ids[len(prompt) :]


def some_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [(1, 7, 45, 12, 30)[i % 5] for i in range(count)]
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize(
    ("family", "changes", "kernels"),
    [("Llama", {}, "torch"), ("Llama", {}, "auto"), ("Qwen2", {}, "auto"), ("Gemma2", {"head_dim": 16}, "torch")],
)
def test_eight_adapters_over_two_slots_in_one_batch(
    tmp_path: Path, family: str, changes: dict[str, Any], kernels: str
) -> None:
    """Of several ranks and kinds, with others that have none: all answers are those of merged weights."""
    path = saved(tmp_path / "model", family, **changes)
    kinds: list[dict[str, Any]] = [
        {"rank": 4},
        {"rank": 1, "alpha": 3.0},
        {"rank": 6, "use_rslora": True},
        {"targets": ("q_proj", "v_proj"), "size": 0.4},
        {"targets": ("down_proj",), "size": 0.4},
        {"rank": 8, "alpha": 4.0},
        {"targets": ("gate_proj", "up_proj", "o_proj")},
        {"rank": 3, "targets": ("k_proj", "o_proj"), "size": 0.5},
    ]
    adapters = {f"a{i}": saved_adapter(path, tmp_path / f"a{i}", 20 + i, **kind) for i, kind in enumerate(kinds)}
    engine = Engine(runner_of(path, adapters, kernels=kernels))
    asked = [(prompt, f"a{i % 9}" if i % 9 < 8 else "") for i, prompt in enumerate(some_prompts(18))]
    for number, (prompt, name) in enumerate(asked):
        engine.ask(number, prompt, name)
    assert engine.run() == 2
    models = {name: merged_model(path, at) for name, at in adapters.items()} | {"": plain_model(path)}
    for number, (prompt, name) in enumerate(asked):
        assert engine.answers[number] == greedy(models[name], prompt), (number, name)
    assert len({tuple(greedy(model, asked[2][0])) for model in models.values()}) > 5, "adapters change answers"
    assert engine.core.is_idle()
    assert engine.core.pool.is_idle()
    assert not any(engine.adapters.users(adapter.digest) for adapter in engine.runner.adapters)


def test_many_adapters_in_one_step(tmp_path: Path) -> None:
    """Decodes of all together, and prompts longer than what is computed together."""
    path = saved(tmp_path / "model", "Llama")
    adapters = {f"a{i}": saved_adapter(path, tmp_path / f"a{i}", 40 + i, rank=1 + i) for i in range(5)}
    engine = Engine(runner_of(path, adapters, slots=5), slots=5)
    asked = [(prompt, f"a{i % 6}" if i % 6 < 5 else "") for i, prompt in enumerate(some_prompts(12))]
    for number, (prompt, name) in enumerate(asked):
        engine.ask(number, prompt, name)
    assert engine.run() == 5
    models = {name: merged_model(path, at) for name, at in adapters.items()} | {"": plain_model(path)}
    for number, (prompt, name) in enumerate(asked):
        assert engine.answers[number] == greedy(models[name], prompt), (number, name)


def test_no_prefix_is_shared_between_adapters(tmp_path: Path) -> None:
    """One prompt, asked with two adapters and with none, twice each: the second time all is cached, and right."""
    path = saved(tmp_path / "model", "Llama")
    adapters = {name: saved_adapter(path, tmp_path / name, 50 + i) for i, name in enumerate("ab")}
    engine = Engine(runner_of(path, adapters))
    prompt = some_prompts(3)[2]
    models = {name: merged_model(path, at) for name, at in adapters.items()} | {"": plain_model(path)}
    for round_ in range(2):
        for number, (name, model) in enumerate(models.items(), 10 * round_):
            engine.ask(number, prompt, name)
            engine.run()
            assert engine.answers[number] == greedy(model, prompt)
            assert engine.ends[number].cached_tokens == round_ * (len(prompt) // BLOCK * BLOCK)


def test_a_block_name_without_its_adapter_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test before this one tests something: with that bug the second adapter answers from the first one's KV."""
    path = saved(tmp_path / "model", "Llama")
    adapters = {name: saved_adapter(path, tmp_path / name, 50 + i) for i, name in enumerate("ab")}
    engine = Engine(runner_of(path, adapters))
    monkeypatch.setattr("engine.core.root_hash", lambda *given, long, adapter: root_hash(*given, long=long))
    prompt = some_prompts(3)[2]
    for number, name in enumerate("ab"):
        engine.ask(number, prompt, name)
        engine.run()
    assert engine.ends[1].cached_tokens
    assert engine.answers[1] != greedy(merged_model(path, adapters["b"]), prompt)


def test_without_adapters_nothing_is_different(tmp_path: Path) -> None:
    """The model runs as one call, and blocks have the names that they always had."""
    path = saved(tmp_path / "model", "Llama")
    runner = runner_of(path, {})
    assert "adapters" not in runner.describe_path()
    with_one = runner_of(path, {"a": saved_adapter(path, tmp_path / "a", 1)})
    assert with_one.describe_path().endswith(", adapters: 1 in 2 slots")
    names = []
    for each in (runner, with_one):
        engine = Engine(each)
        engine.ask(1, some_prompts(3)[2])
        engine.run()
        names.append((set(engine.core.pool.names()), engine.answers[1]))
    assert names[0] == names[1]


def test_files_that_change_end_who_asks_and_nobody_else(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", "Llama")
    adapters = {name: saved_adapter(path, tmp_path / name, 60 + i) for i, name in enumerate("ab")}
    engine = Engine(runner_of(path, adapters, live={"host_mb": 0}))
    saved_adapter(path, tmp_path / "b", 99)
    engine.ask(1, some_prompts(1)[0], "b")
    plan = engine.core.schedule(0.0)
    assert plan is not None
    with pytest.raises(AdapterError, match="adapter 'b' cannot be served: its files have changed") as raised:
        engine.runner.execute(plan)
    again = repeat(plan, raised.value, engine.runner.execute, [True])
    assert [end.error for end in engine.core.commit(plan, again, 0.0).ends] == [str(raised.value)]
    refusal = engine.core.add(SequenceSpec(3, [5, 6], SamplingParams(), adapter=engine.digest("b")), 0.0)
    assert refusal is not None
    assert refusal.reason == str(raised.value)
    engine.ask(2, some_prompts(2)[1], "a")
    engine.run()
    assert engine.answers[2] == greedy(merged_model(path, adapters["a"]), some_prompts(2)[1])


def test_adapters_come_and_go_while_others_compute(tmp_path: Path) -> None:
    """On a worker that starts with none: loaded between steps, dropped, and its slot is given to another."""
    path = saved(tmp_path / "model", "Llama")
    engine = Engine(runner_of(path, {}, live={"max_rank": 8}))
    layers = engine.runner.adapter_layers
    assert layers is not None
    at = {f"a{i}": saved_adapter(path, tmp_path / f"a{i}", 80 + i, rank=(2, 8, 5)[i]) for i in range(3)}
    digests: dict[str, str] = {}

    def load(name: str) -> None:
        adapter, pairs = layers.read(name, str(at[name]))
        layers.add(adapter, pairs)
        engine.adapters.add(adapter.digest)
        digests[name] = adapter.digest

    def ask(number: int, prompt: list[int], name: str) -> None:
        spec = SequenceSpec(number, prompt, SamplingParams(max_tokens=ANSWER), adapter=digests.get(name, ""))
        assert engine.core.add(spec, 0.0) is None

    prompts = some_prompts(6)
    ask(0, prompts[0], "")
    load("a0")
    ask(1, prompts[1], "a0")
    for _ in range(2):  # both have begun
        plan = engine.core.schedule(0.0)
        assert plan is not None
        for token in engine.core.commit(plan, engine.runner.execute(plan), 0.0).tokens:
            engine.answers.setdefault(token.sequence_id, []).append(token.token_id)
    load("a1")
    shutil.rmtree(at["a0"])  # files may go
    ask(2, prompts[2], "a1")
    ask(3, prompts[3], "a0")
    engine.run()
    engine.adapters.drop(digests["a0"])
    layers.drop(digests["a0"])
    load("a2")
    ask(4, prompts[4], "a2")
    ask(5, prompts[5], "a1")
    engine.run()
    saved_adapter(path, at["a0"], 80, rank=2)
    models = {name: merged_model(path, where) for name, where in at.items()} | {"": plain_model(path)}
    for number, name in enumerate(("", "a0", "a1", "a0", "a2", "a1")):
        assert engine.answers[number] == greedy(models[name], prompts[number]), (number, name)
    assert set(engine.adapters.loaded) == {digests["a1"], digests["a2"]}
    assert layers.load_ms > 0
    refusal = engine.core.add(SequenceSpec(9, [5, 6], SamplingParams(), adapter=digests["a0"]), 0.0)
    assert refusal is not None
    assert "or no more" in refusal.reason
    big = saved_adapter(path, tmp_path / "big", 1, rank=9)
    with pytest.raises(AdapterError, match=r"has rank 9, and there is room for 8; set engine\.adapters\.max_rank to 9"):
        layers.read("big", str(big))
    other = saved(tmp_path / "other", "Llama", num_hidden_layers=3)
    with pytest.raises(AdapterError, match="the model has no linear layer"):
        layers.read("other", str(saved_adapter(other, tmp_path / "of-other", 1)))
    os.mkfifo(tmp_path / "big" / "pipe")
    (tmp_path / "big" / "adapter_model.safetensors").unlink()
    (tmp_path / "big" / "pipe").rename(tmp_path / "big" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="is no file"):
        layers.read("pipe", str(tmp_path / "big"))
    with (at["a1"] / "adapter_model.safetensors").open("ab") as file:
        file.truncate(1 << 32)
    with pytest.raises(AdapterError, match=r"more than the \d+ there is room for"):
        layers.read("huge", str(at["a1"]))


def test_the_first_ones_are_kept_in_host_memory_too(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", "Llama")
    adapters = {name: saved_adapter(path, tmp_path / name, 60 + i) for i, name in enumerate("ab")}
    engine = Engine(runner_of(path, adapters, slots=1), slots=1)
    expected = {name: greedy(merged_model(path, at), some_prompts(1)[0]) for name, at in adapters.items()}
    for at in adapters.values():
        shutil.rmtree(at)
    for number, name in enumerate("abab"):
        engine.ask(number, some_prompts(1)[0], name)
    engine.run()
    assert [engine.answers[number] for number in range(4)] == [expected[name] for name in "abab"]


def test_what_overflows_in_one_adapter_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows computed together: one adapter's products are infinite, the other one's rows do not notice."""
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False)}).requires_grad_(False)
    weights = {"good": (torch.randn(2, 8), torch.randn(8, 2)), "bad": (torch.full((2, 8), 3e38), torch.ones(8, 2))}
    monkeypatch.setattr("engine.adapters.layers.read_again", lambda adapter: {"q_proj": weights[adapter.digest]})
    both = [Adapter(name, Path(), name, 1.0, {"q_proj": (2, 8, 8)}, 3e38, 0) for name in weights]
    layers, rows = AdapterLayers(model, {"q_proj": (8, 8)}, both, 2), torch.ones(2, 8)
    with torch.inference_mode():
        with layers.during([(InSlot(0, "good"), 0, 1)]):
            alone = model["q_proj"](rows)[0]
        with layers.during([(InSlot(0, "good"), 0, 1), (InSlot(1, "bad"), 1, 2)]):
            beside = model["q_proj"](rows)
    assert torch.allclose(alone, beside[0])
    assert not beside[1].isfinite().any()
    with pytest.raises(AdapterError, match=r"go up to 3e\+38, which is more than torch.float16 holds"):
        AdapterLayers(model.half(), {"q_proj": (8, 8)}, both, 2)


@pytest.mark.parametrize(
    ("changes", "dtype", "why"),
    [
        ({"lora_alpha": 10**400}, torch.float32, "its lora_alpha is 1000"),
        ({"lora_alpha": True}, torch.float32, "its lora_alpha is True"),
        ({"lora_alpha": float("nan")}, torch.float32, "its lora_alpha is nan"),
        ({}, torch.float8_e4m3fn, "is no matrix of floating-point numbers of 16 bits or more"),
        ({"r": [[[]]]}, torch.float32, "its rank is"),
        (None, torch.float32, "it cannot be read from"),
    ],
)
def test_odd_files_are_refused_and_end_nothing(
    tmp_path: Path, changes: dict[str, Any] | None, dtype: torch.dtype, why: str
) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | (changes or {})
    written = "[" * 100_000 if changes is None else json.dumps(config)
    (tmp_path / "adapter_config.json").write_text(written)
    parts = {"A": torch.ones(2, 8).to(dtype), "B": torch.ones(8, 2)}
    named = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": t for part, t in parts.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=why):
        read_adapter("a", str(tmp_path))


def test_the_digest_is_of_what_is_computed(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", "Llama")
    digests = [
        read_adapter(name, str(saved_adapter(path, tmp_path / name, **changes))).digest
        for name, changes in {
            "one": {"seed": 1},
            "same": {"seed": 1, "lora_dropout": 0.3},
            "weights": {"seed": 2},
            "alpha": {"seed": 1, "alpha": 9.0},
            "rslora": {"seed": 1, "use_rslora": True},
        }.items()
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"bias": "lora_only"}, "it trains biases"),
        ({"modules_to_save": ["lm_head"]}, "it replaces whole modules"),
        ({"peft_type": "IA3"}, "its peft_type is IA3"),
        ({"rank_pattern": {"q_proj": 2}}, "it has rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "it has alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "changes the model's own weights"),
        ({"alora_invocation_tokens": [1, 2]}, "it has alora_invocation_tokens"),
        ({"some_future_setting": 1}, "it has some_future_setting"),
        ({"r": 5}, "has another rank than 5"),
        ({"targets": ("lm_head",)}, "it adapts lm_head"),
    ],
)
def test_what_is_not_computed_exactly_is_refused(tmp_path: Path, settings: dict[str, Any], why: str) -> None:
    path = saved(tmp_path / "model", "Llama")
    at = saved_adapter(path, tmp_path / "a", 1, **settings)
    with pytest.raises(AdapterError, match=why):
        read_adapter("a", str(at))


def test_pickles_and_half_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", "Llama")
    at = saved_adapter(path, tmp_path / "a", 1)
    (at / "adapter_model.safetensors").rename(at / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors; save it with safetensors"):
        read_adapter("a", str(at))
    (at / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(AdapterError, match="it cannot be read from"):
        read_adapter("a", str(at))
    (at / "adapter_config.json").write_text(json.dumps([1]))
    saved_adapter(path, at, 1)
    assert read_adapter("a", str(at)).rank == 4


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    path, other = saved(tmp_path / "model", "Llama"), saved(tmp_path / "other", "Llama", num_hidden_layers=3)
    with pytest.raises(ModelLoadError, match=r"the model has no linear layer model\.layers\.2"):
        runner_of(path, {"a": saved_adapter(other, tmp_path / "a", 1)})
    wider = saved(tmp_path / "wider", "Llama", intermediate_size=128)
    wide = saved_adapter(wider, tmp_path / "b", 1, targets=("down_proj",))
    with pytest.raises(ModelLoadError, match=r"is 64 x 96, and the adapter's 64 x 128"):
        runner_of(path, {"a": wide})


def test_a_sequence_with_an_unknown_adapter_is_refused(tmp_path: Path) -> None:
    engine = EngineCore(EngineLimits(BLOCK, 20, 8, 8, 256, 128), BlockPool(8))
    refusal = engine.add(SequenceSpec(1, [1, 2], SamplingParams(), adapter="0" * 32), 0.0)
    assert refusal is not None
    assert "there is no adapter 0000" in refusal.reason


def test_a_file_that_has_grown_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = saved_adapter(saved(tmp_path / "model", "Llama"), tmp_path / "a", 1)
    adapter = read_adapter("a", str(at))
    assert read_again(adapter)
    with (at / "adapter_model.safetensors").open("ab") as file:
        file.truncate(1 << 40)  # sparse
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("it was read"))
    with pytest.raises(AdapterError, match="its files have changed since it was loaded"):
        read_again(adapter)
