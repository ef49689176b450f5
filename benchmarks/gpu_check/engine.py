"""The whole engine in float32, token for token against transformers `generate` over the same random weights."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_check.attention import exact_float32
from benchmarks.gpu_check.backends import serving_groups
from benchmarks.gpu_check.context import Check, CheckFailed, significant
from benchmarks.gpu_check.models import EXACT, answer, build, make_runner, prompt_of
from benchmarks.gpu_check.variants import Variant, record_graphs, took_effect, variants

_LENGTHS = (1, 5, 32, 33, 70, 129, 300)
_TINY_LENGTHS = (1, 32, 50)


def generated(model: Any, device: torch.device, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt], device=device)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def margin(model: Any, device: torch.device, tokens: list[int]) -> float:
    """By how much the reference prefers its next token: a near tie explains a difference, a wide margin does not."""
    with torch.inference_mode():
        top = model(torch.tensor([tokens], device=device), use_cache=False).logits[0, -1].topk(2).values
    return (top[0] - top[1]).item()


def compare(
    plain: Any, device: torch.device, prompts: list[list[int]], expected: list[list[int]], answers: list[list[int]]
) -> tuple[int, list[str]]:
    """How many answers are those of the reference, and where others differ."""
    wrong: list[str] = []
    for prompt, want, got in zip(prompts, expected, answers, strict=True):
        if want == got:
            continue
        at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), len(got))
        gap = significant(margin(plain, device, prompt + want[:at]), 3)
        wrong.append(
            f"prompt of {len(prompt)}: token {at} differs; the reference prefers its own by {gap} in the logits"
        )
    return len(prompts) - len(wrong), wrong


def runs(check: Check, found: dict[str, Any]) -> Iterator[tuple[Variant, Any, str]]:
    """Each variant's runner, over every backend where that is asked."""
    for variant in variants(check):
        runner, _ = make_runner(check.device, EXACT, "float32", num_blocks=200, **variant.options)
        own = runner.forward.backend.name
        found.setdefault("chosen_backend", own)
        if not variant.every_backend:
            yield variant, runner, own
            continue
        served, _ = serving_groups(check, runner)
        for name, backend in served:
            runner.forward.backend = backend
            yield variant, runner, name


def engine(check: Check, found: dict[str, Any]) -> None:
    lengths = _TINY_LENGTHS if check.tiny else _LENGTHS
    new_tokens = 6 if check.tiny else 32
    prompts = [prompt_of(n, EXACT.vocab, seed=n) for n in lengths]
    problems: list[str] = []
    found["problems"] = problems
    rows = []
    with exact_float32():
        plain = build(EXACT, check.device, torch.float32, "sdpa")
        expected = [generated(plain, check.device, p, new_tokens) for p in prompts]
        found["not_there"] = []
        for variant, runner, backend in runs(check, found):
            name = ", ".join(n for n in (backend, variant.label) if n)
            try:
                if "graphs" in variant.label:
                    answer(runner, prompts, new_tokens, 37)
                    record_graphs(runner)
                ways = {
                    "single": [answer(runner, [p], new_tokens, 512)[0] for p in prompts],
                    "batched": answer(runner, prompts, new_tokens, 2048),
                    "chunked": answer(runner, prompts, new_tokens, 37),
                    "overlapping": answer(runner, prompts, new_tokens, 37, overlap=True),
                }
            except Exception:
                problems.append(f"{name}:\n{traceback.format_exc()}")
                if not check.device_works():
                    found["broke_the_device"] = backend
                    raise
                continue
            if missing := took_effect(variant, runner):
                found["not_there"].append(missing)
                check.say(f"engine: {missing}")
            for way, answers in ways.items():
                right, wrong = compare(plain, check.device, prompts, expected, answers)
                problems += [f"{name}, {way}, {what}" for what in wrong]
                found[f"{name}, {way}"] = f"{right} of {len(prompts)} exact"
                rows.append((name, way, f"{right} of {len(prompts)}", new_tokens))
    check.table(("engine against generate, float32", "way", "answers exact", "tokens each"), rows)
    if problems:
        raise CheckFailed("; ".join(problems[:5]))
