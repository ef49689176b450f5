"""Decoding of models with recurrent layers: the engine against transformers' own `generate`, in one process.

Models have random weights and sizes that make a step's time be spent in layers. Both take the same prompts as one batch
and answer greedily; they take turns, and each figure is the median of tokens a second of the decode steps alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import median, parse, save, table
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec

PROMPT = 32
SIZE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "pad_token_id": 0,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_expand": 2}
ONE_IN_FOUR = {"layer_types": [*["linear_attention"] * 3, "full_attention"] * 2}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3_5Text": ONE_IN_FOUR | {
        "head_dim": 64, "linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "GraniteMoeHybrid": ONE_IN_FOUR | MAMBA | {"num_local_experts": 0, "shared_intermediate_size": 1024},
    "FalconH1": MAMBA | {"mamba_d_ssm": 1024},
    "Lfm2": {"layer_types": [*["conv"] * 3, "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "Jamba": {"attn_layer_period": 4, "attn_layer_offset": 3, "num_experts": 1, "num_experts_per_tok": 1},
}  # fmt: skip


class Ours:
    def __init__(self, path: str, threads: int, batch: int, prompts: torch.Tensor) -> None:
        self._runner = ModelRunner(EngineConfig(model=path, dtype="float32", num_blocks=512, threads=threads))
        self._limits = EngineLimits(self._runner.block_tokens, 512, batch, batch, 1024, SIZE["vocab_size"])
        self._prompts = prompts.tolist()
        self.name = self._runner.forward.name

    def run(self, tokens: int) -> tuple[float, list[list[int]]]:
        runner = self._runner
        rules = [group.rule for group in runner.facts.groups]
        core = EngineCore(self._limits, BlockPool(runner.num_blocks), rules=rules)
        answers: list[list[int]] = [[] for _ in self._prompts]
        for n, prompt in enumerate(self._prompts):
            assert core.add(SequenceSpec(n, prompt, SamplingParams(max_tokens=tokens)), 0.0) is None
        begun = 0.0
        while (plan := core.schedule(0.0)) is not None:
            if not begun and all(len(item.token_ids) == 1 for item in plan.items):
                begun = time.perf_counter()
            for token in core.commit(plan, runner.execute(plan), 0.0).tokens:
                answers[token.sequence_id].append(token.token_id)
        return time.perf_counter() - begun, answers


class Theirs:
    def __init__(self, path: str, prompts: torch.Tensor) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._prompts = prompts

    def _generate(self, tokens: int) -> tuple[float, list[list[int]]]:
        begun = time.perf_counter()
        with torch.inference_mode():
            found = self._model.generate(self._prompts, max_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - begun, found[:, PROMPT:].tolist()

    def run(self, tokens: int) -> tuple[float, list[list[int]]]:
        prompt, _ = self._generate(1)
        whole, answers = self._generate(tokens)
        return whole - prompt, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parse(parser, models=["Lfm2"], tokens=4, repeats=1)
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    rows, results = [], {}
    for name in arguments.models:
        torch.manual_seed(3)
        prompts = torch.randint(3, SIZE["vocab_size"], (arguments.batch, PROMPT))
        config = getattr(transformers, f"{name}Config")(**(SIZE | MODELS[name]))
        with tempfile.TemporaryDirectory() as path:
            transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(Path(path))
            theirs = Theirs(path, prompts)
            ours = Ours(path, arguments.threads, arguments.batch, prompts)
            speeds: dict[str, list[float]] = {"engine": [], "transformers": []}
            decoded = arguments.batch * (arguments.tokens - 1)
            for _ in range(arguments.repeats):
                took, found = ours.run(arguments.tokens)
                speeds["engine"].append(decoded / took)
                took, expected = theirs.run(arguments.tokens)
                speeds["transformers"].append(decoded / took)
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        medians = {who: median(values) for who, values in speeds.items()}
        results[name] = {who: round(value, 1) for who, value in medians.items()} | {"equal_answers": same}
        ratio = medians["engine"] / medians["transformers"]
        rows.append([name, *(f"{value:.0f}" for value in medians.values()), f"{ratio:.2f}", f"{same}/{len(found)}"])
    table(["tokens/s of decode steps", "engine", "transformers", "ratio", "equal answers"], rows)
    save("recurrent", {"arguments": vars(arguments), "attention": ours.name, "models": results})


if __name__ == "__main__":
    main()
