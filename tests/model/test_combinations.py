"""Every way to compute that a machine without a GPU has, on one course of requests: plain transformers' tokens, each.

The course has what may go wrong: chunks of prompts among decodes, seeded sampling, stop tokens, penalties, a prefix
hit, a preemption, a cancel with steps in flight, a prompt handed over and adopted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.forward import TorchForward
from engine.overlap import Launched, launcher_of
from engine.runner import ModelRunner
from engine.sampler import sample
from engine.scheduler import EngineLimits
from engine.types import PlanItem, SamplingParams, SequenceSpec, StepEvents, StepPlan
from tests.model.test_families import saved
from tests.support import attention_libraries
from tests.support.prompts import clear_choice
from tests.support.runners import started
from tests.support.triton_interpreter import ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="make gpu-check compares the backends there")

BLOCK, BLOCKS, BUDGET = 8, 9, 20
GREEDY = SamplingParams(max_tokens=9)
SEEDED = SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, seed=5)
PENALISED = SamplingParams(max_tokens=6, presence_penalty=0.7, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "Llama": saved(tmp_path_factory.mktemp("llama"), "Llama"),
        "small": saved(
            tmp_path_factory.mktemp("small"),
            "Llama",
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            hidden_size=32,
        ),
        "Olmo2": saved(tmp_path_factory.mktemp("olmo2"), "Olmo2"),
    }


@lru_cache(maxsize=2)
def plain(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@lru_cache(maxsize=64)
def answer(path: Path, prompt: tuple[int, ...], sampling: SamplingParams) -> list[int]:
    """Plain transformers, the whole history anew for every token, and our sampler on its logits."""
    history, found = list(prompt), []
    while len(found) < sampling.max_tokens:
        with torch.inference_mode():
            logits = plain(path)(torch.tensor([history])).logits[0, -1:]
        item = PlanItem(0, (), 0, (), True, len(found), sampling, len(prompt), list(history))
        (token,), _ = sample(logits, [item])
        assert sampling is not GREEDY or token == clear_choice(logits[0])
        history.append(token)
        found.append(token)
        if token in sampling.stop_token_ids:
            break
    return found


def prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 128, (length,), generator=generator).tolist())


@dataclass
class Course:
    """The requests, and the driver: `overlap` as the worker's loop does, else step by step."""

    core: EngineCore
    runner: ModelRunner
    launcher: Any = None  # None: one step after the other
    answers: dict[int, list[int]] = field(default_factory=dict)
    flying: deque[tuple[StepPlan, Launched]] = field(default_factory=deque)
    followed: int = 0

    def add(self, number: int, tokens: tuple[int, ...], sampling: SamplingParams, **options: Any) -> None:
        assert self.core.add(SequenceSpec(number, list(tokens), sampling, **options), 0.0) is None
        self.answers.setdefault(number, [])

    def turn(self) -> bool:
        plan = self.core.schedule(0.0)
        if plan is not None:
            self.followed += sum(item.follows is not None for item in plan.items)
            launcher = self.launcher or self.runner
            self.flying.append((plan, launcher.launch(plan)))
        if self.flying and (plan is None or self.launcher is None or len(self.flying) > 1):
            self.land()
            return True
        return plan is not None

    def land(self) -> None:
        plan, step = self.flying.popleft()
        self.take(self.core.commit(plan, step.wait(), 0.0))
        self.core.check()

    def take(self, events: StepEvents) -> None:
        for token in events.tokens:
            assert token.position == len(self.answers[token.sequence_id])
            self.answers[token.sequence_id].append(token.token_id)

    def run(self) -> None:
        while self.turn():
            pass


def run_course(path: Path, runner: ModelRunner, launcher: Any) -> Course:
    limits = EngineLimits(BLOCK, BUDGET, 8, 16, 256, runner.facts.vocab_size)
    pool = BlockPool(BLOCKS)
    course = Course(EngineCore(limits, pool), runner, launcher)
    stop = frozenset(answer(path, prompt(19, 3), GREEDY)[3:4])
    wanted: dict[int, tuple[tuple[int, ...], SamplingParams]] = {
        1: (prompt(30, 1), GREEDY),
        2: (prompt(7, 2), SEEDED),
        3: (prompt(19, 3), SamplingParams(max_tokens=12, stop_token_ids=stop)),
        4: (prompt(5, 4), SamplingParams(max_tokens=30)),
        5: (prompt(30, 1), SEEDED),
        6: (prompt(11, 6), PENALISED),
    }  # fmt: skip
    for number in (1, 2, 3, 4):
        course.add(number, *wanted[number])
    for _ in range(7):
        course.turn()
    assert course.core.cancel(4)
    course.core.check()
    course.add(5, *wanted[5])
    course.run()
    course.add(6, *wanted[6])
    # Handed over and adopted, as by another worker.
    handed = prompt(21, 7)
    course.add(7, handed, GREEDY, hand_over=True, retain=True)
    course.run()
    course.add(8, handed, GREEDY, hold=True, cache_salt="another worker")
    room = course.core.reserve(8, len(handed), 0.0)
    assert room is not None
    for source, target in zip(course.core.block_table(7), room.block_ids, strict=True):
        runner.kv[target] = runner.kv[source]
    course.answers[8] = list(course.answers[7])
    course.core.adopt(8, len(handed), course.answers[7], 0.0)
    course.core.drop(7)
    course.run()
    for number, (tokens, sampling) in wanted.items():
        expected = answer(path, tokens, sampling)
        assert course.answers[number] == (expected[: len(course.answers[4])] if number == 4 else expected), number
    assert course.answers[8] == answer(path, handed, GREEDY)
    assert len(course.answers[3]) < 12, "its stop token ended it"
    assert course.core.is_idle()
    assert pool.is_idle()
    return course


def triton(runner: ModelRunner) -> None:
    from engine.attention.triton_paged import Sizes, TritonBackend

    assert isinstance(runner.forward, TorchForward)
    runner.forward.backend = TritonBackend(Sizes(rows=16, few_rows=16, keys=16, split_tokens=32))


def flashinfer(runner: ModelRunner) -> None:
    """What it calls is replaced, as in tests/contract/test_attention.py."""
    from engine.attention.flashinfer_paged import FlashInferBackend

    assert isinstance(runner.forward, TorchForward)
    runner.forward.backend = FlashInferBackend(attention_libraries)


def flash_attn(runner: ModelRunner) -> None:
    from engine.attention.flash_attn_paged import FlashAttnBackend

    class OfAnyPage:
        flash_attn_varlen_func = staticmethod(partial(attention_libraries.flash_attn_varlen_func, page_multiple=1))

    assert isinstance(runner.forward, TorchForward)
    runner.forward.backend = FlashAttnBackend(OfAnyPage)


def fused(runner: ModelRunner) -> None:
    from engine.fused.model import FusedModel

    triton(runner)
    assert isinstance(runner.forward, TorchForward)
    model: Any = runner.forward.model
    made = FusedModel(model, 2, runner.facts.groups[0].kv_heads)
    runner.forward = TorchForward(made, runner.forward.backend, layers="fused layers")


def graphs(runner: ModelRunner) -> None:
    from engine.graphs import GraphForward
    from tests.contract.test_graphs import Again

    fused(runner)
    assert isinstance(runner.forward, TorchForward)
    recorder = Again()
    runner.forward = GraphForward(runner.forward, recorder, 16, 4)
    while runner.improve():
        pass
    assert recorder.recorded == 3


TORCH = {"kernels": "torch"}
WAYS: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "native stack": ("Llama", {"kernels": "native"}, None, "native stack"),
    "native attention": ("Olmo2", {"kernels": "native"}, None, "native paged"),
    "gather": ("Llama", {**TORCH, "attention": "gather"}, None, "torch gather"),
    "batch-invariant": ("Llama", {**TORCH, "batch_invariant": True}, None, "batch-invariant"),
    "flashinfer": ("Llama", TORCH, flashinfer, "flashinfer"),
    "flash_attn": ("Llama", TORCH, flash_attn, "flash_attn"),
    "triton": ("small", TORCH, triton, "triton paged"),
    "triton, fused layers, graphs": ("small", TORCH, graphs, "fused layers, CUDA graphs"),
}
# Steps: one after the other; overlapping, as on CPU; overlapping with tokens that arrive on the device, as on CUDA.
STEPS = ("one by one", "overlapping", "tokens on the device")
SLOW = {way for way in WAYS if way.startswith("triton")}  # through the interpreter


def combinations() -> list[tuple[str, str]]:
    found = [(way, steps) for way in WAYS for steps in STEPS]
    found = [(way, steps) for way, steps in found if not (way.startswith("native") and steps == STEPS[2])]
    return [(way, steps) for way, steps in found if way not in SLOW or steps == STEPS[2]]


@pytest.mark.parametrize(("way", "steps"), combinations())
def test_every_way_gives_the_same_tokens(paths: dict[str, Path], way: str, steps: str) -> None:
    family, settings, prepare, name = WAYS[way]
    config = {"model": str(paths[family]), "dtype": "float32", "num_blocks": BLOCKS, "block_tokens": BLOCK}
    runner = started({**config, "threads": 1, **settings})
    if prepare is not None:
        prepare(runner)
    launcher = None
    if steps == "overlapping":
        launcher = launcher_of("on", runner)
    elif steps == "tokens on the device":
        runner.tokens_on_host, launcher = False, runner
    assert name in runner.forward.name
    course = run_course(paths[family], runner, launcher)
    assert course.core.load().preemptions_total > 0 or family != "Llama"
    assert (course.followed > 0) == (launcher is not None)
    assert name in runner.forward.name, "it was given up on the way"
