"""Speculative decoding, by lookup or by a draft model, against plain decoding: what it gains; that it never costs much.

    python -m benchmarks.speculation
    python -m benchmarks.speculation --draft-model /models/small     with a draft model instead of prompt lookup
    python -m benchmarks.speculation --draft-model first:10          made of the model's first layers; untrained as such

Three kinds of requests, one at a time: questions as in a chat, a text to shorten, a program to rewrite. Then batches of
all three in turns, up to where drafts do not pay any more. Both engines take turns in one process; a ratio is of
neighbouring runs, of the time from the last first token on. Texts and programs are this project's own.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.report import parse, save, table
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.speculation import SpeculationCounts, SpeculationLimits
from engine.step_cost import StepCostEstimate
from engine.types import SamplingParams, SequenceSpec
from settings.model_path import resolve_model

_ROOT = Path(__file__).resolve().parents[1]
KINDS = ("chat", "summary", "code")
_QUESTIONS = (
    "What is the capital of Australia, and why is it not Sydney?",
    "Explain to a child why the sky is blue.",
    "Give me three ideas for a birthday present for my grandmother.",
    "How do I keep bread fresh for a week?",
)
_TEXTS = ("docs/routing.md", "docs/reliability.md", "docs/elasticity.md", "docs/lifecycle.md")
_PROGRAMS = ("engine/block_pool.py", "engine/chunk_budget.py", "kv_transfer/lease.py", "worker/rates.py")


def prompts(kind: str, tokenizer: Any, count: int, characters: int) -> list[list[int]]:
    """The first `count` of a kind; of texts and programs so many characters."""
    if kind == "chat":
        asked = list(_QUESTIONS)
    elif kind == "summary":
        asked = [f"Shorten this text. Keep its words.\n\n{_beginning(name, characters)}" for name in _TEXTS]
    else:
        asked = [f"Repeat this program with better comments:\n\n{_beginning(name, characters)}" for name in _PROGRAMS]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for text in asked[:count]
    ]


def _beginning(name: str, characters: int) -> str:
    return (_ROOT / name).read_text()[:characters]


@dataclass(frozen=True, slots=True)
class Run:
    decode_s: float  # from the last first token on
    tokens: int  # since then
    steps: int
    counts: SpeculationCounts
    answers: list[list[int]]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.decode_s


class Bench:
    def __init__(self, runner: ModelRunner, max_tokens: int) -> None:
        self._runner = runner
        self._limits = SpeculationLimits(max_tokens, draft=runner.draft_limits)
        # Learned over all runs, as a worker learns them.
        self._costs = {False: StepCostEstimate(), True: StepCostEstimate()}

        self._passes = StepCostEstimate()

    def run(self, batch: list[list[int]], new_tokens: int, *, speculation: bool) -> Run:
        limits = EngineLimits(self._runner.block_tokens, 512, 64, 64, 8192, self._runner.facts.vocab_size)
        pool = BlockPool(self._runner.num_blocks)
        drafts = self._limits if speculation else None
        core = EngineCore(limits, pool, step_cost=self._costs[speculation], speculation=drafts)
        if core.speculation is not None and core.speculation.draft is not None:
            core.speculation.draft.cost = self._passes
        for i, prompt in enumerate(batch):
            assert core.add(SequenceSpec(i, prompt, SamplingParams(max_tokens=new_tokens)), 0.0) is None
        answers: list[list[int]] = [[] for _ in batch]
        begun, tokens, steps = 0.0, 0, 0
        while (plan := core.schedule(time.perf_counter())) is not None:
            events = core.commit(plan, self._runner.execute(plan), time.perf_counter())
            for token in events.tokens:
                answers[token.sequence_id].append(token.token_id)
            if begun:
                tokens += len(events.tokens)
                steps += 1
            elif all(answers):
                begun = time.perf_counter()
        counts = SpeculationCounts() if core.speculation is None else core.speculation.counts
        return Run(time.perf_counter() - begun, tokens, steps, counts, answers)

    def compare(self, batch: list[list[int]], new_tokens: int, repeats: int) -> dict[str, float]:
        ratios: list[float] = []
        plain: list[Run] = []
        drafted: list[Run] = []
        for repeat in range(repeats + 1):
            off = self.run(batch, new_tokens, speculation=False)
            on = self.run(batch, new_tokens, speculation=True)
            if repeat:  # the first is not counted
                plain.append(off)
                drafted.append(on)
                ratios.append(on.tokens_per_s / off.tokens_per_s)
        last = drafted[-1].counts
        pairs = [(off.answers, on.answers) for off, on in zip(plain, drafted, strict=True)]
        same = [a == b for answers in pairs for a, b in zip(*answers, strict=True)]
        return {
            "plain_tokens_per_s": statistics.median(run.tokens_per_s for run in plain),
            "tokens_per_s": statistics.median(run.tokens_per_s for run in drafted),
            "ratio": statistics.median(ratios),
            "lowest_ratio": min(ratios),
            "tokens_per_step": statistics.median(run.tokens / run.steps / len(batch) for run in drafted),
            "tokens_per_verification": 1 + last.accepted / last.verified if last.verified else 0.0,
            "accepted_share": last.accepted / last.proposed if last.proposed else 0.0,
            "drafts_per_token": last.proposed / max(1, sum(map(len, drafted[-1].answers))),
            "same_answers": sum(same) / len(same),
        }


@contextlib.contextmanager
def draft_model(wanted: str, model: str) -> Iterator[str]:
    """Its directory. `first:N`: `model`, of which only the first N layers are left."""
    if not wanted.startswith("first:"):
        yield wanted
        return
    with tempfile.TemporaryDirectory() as directory:
        smaller = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        layers = int(wanted.removeprefix("first:"))
        smaller.model.layers = smaller.model.layers[:layers]
        smaller.config.num_hidden_layers = layers
        smaller.save_pretrained(directory)
        shutil.copy(Path(model) / "tokenizer.json", directory)
        yield directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=7, help="drafts for a sequence in a step")
    parser.add_argument("--draft-model", default="", help="a directory, or first:N; empty: prompt lookup")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--prompts", type=int, default=4, choices=range(1, 5), help="of each kind")
    parser.add_argument("--characters", type=int, default=2400, help="of a text or a program")
    arguments = parse(parser, repeats=1, new_tokens=8, batches=[2], prompts=1, characters=300)
    path = str(resolve_model(arguments.model))
    settings: dict[str, Any] = {
        "model": path,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "num_blocks": 1400,
    }
    with contextlib.ExitStack() as made:
        if arguments.draft_model:
            smaller = made.enter_context(draft_model(arguments.draft_model, path))
            settings["speculation"] = {"method": "draft", "model": smaller}
        runner = ModelRunner(EngineConfig.model_validate(settings))
    tokenizer = AutoTokenizer.from_pretrained(path)
    bench = Bench(runner, arguments.max_tokens)
    asked = {kind: prompts(kind, tokenizer, arguments.prompts, arguments.characters) for kind in KINDS}
    kinds: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        found = [bench.compare([p], arguments.new_tokens, arguments.repeats) for p in asked[kind]]
        kinds[kind] = {key: statistics.mean(one[key] for one in found) for key in found[0]}
        kinds[kind]["lowest_ratio"] = min(one["lowest_ratio"] for one in found)
    mixed = [p for group in zip(*asked.values(), strict=True) for p in group]
    batches: dict[str, dict[str, float]] = {}
    for size in arguments.batches:
        batch = [mixed[i % len(mixed)] for i in range(size)]
        batches[str(size)] = bench.compare(batch, arguments.new_tokens, arguments.repeats)
    chats = asked["chat"]
    chatting: dict[str, dict[str, float]] = {}
    for size in arguments.batches:
        batch = [chats[i % len(chats)] for i in range(size)]
        chatting[str(size)] = bench.compare(batch, arguments.new_tokens, arguments.repeats)
    save(
        "speculation_draft" if arguments.draft_model else "speculation",
        {
            "engine": runner.describe_path(),
            "draft_model": arguments.draft_model,
            "dtype": arguments.dtype,
            "threads": arguments.threads,
            "new_tokens": arguments.new_tokens,
            "max_tokens": arguments.max_tokens,
            "one_at_a_time": kinds,
            "batches": batches,
            "batches_of_chats": chatting,
        },
    )
    head = ("", "plain tok/s", "tok/s", "ratio", "lowest", "tokens/step", "accepted", "drafts/token", "same answers")
    rows = [
        *kinds.items(),
        *((f"batch {n}", row) for n, row in batches.items()),
        *((f"chats {n}", row) for n, row in chatting.items()),
    ]
    keys = ("plain_tokens_per_s", "tokens_per_s", "ratio", "lowest_ratio", "tokens_per_step", "accepted_share")
    keys += ("drafts_per_token", "same_answers")
    table(head, [(name, *(f"{row[key]:.2f}" for key in keys)) for name, row in rows])


if __name__ == "__main__":
    main()
