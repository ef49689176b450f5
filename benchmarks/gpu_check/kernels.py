"""How fast every attention backend reads its pool: one layer, bfloat16, for each rule that it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_check.attention import TINY_GEOMETRIES, Geometry, kind_of, make_case
from benchmarks.gpu_check.backends import Found, find_backends
from benchmarks.gpu_check.context import Check, CheckFailed, significant
from engine.attention.choose import AttentionShape
from engine.attention.interface import ExtrasUsed
from kv_transfer.layout import Rule

GEOMETRIES = (
    Geometry(32, 8, 128, 32),  # Llama 3.1 8B
    Geometry(64, 8, 64, 32, Rule(window=128), sinks=True),  # gpt-oss
    Geometry(40, 8, 128, 32, Rule(chunk=8192)),  # Llama 4
    Geometry(16, 1, 576, 32, Rule(values=512)),  # DeepSeek V2 Lite
    Geometry(128, 1, 576, 32, Rule(values=512)),  # DeepSeek V3
)
DECODES, TINY_DECODES = ((1, 4095),) * 32, ((1, 39),) * 2
PROMPT, TINY_PROMPT = ((2048, 0),), ((40, 0),)


def kernels(check: Check, found: dict[str, Any]) -> None:
    ceilings = check.sections.get("ceilings", {})
    rows: list[tuple[object, ...]] = []
    failures: list[str] = []
    found["left_out"] = []
    usable = [b for b in find_backends(check) if not b.absent]
    with torch.inference_mode():
        for g in TINY_GEOMETRIES if check.tiny else GEOMETRIES:
            shape = AttentionShape(
                g.heads, g.kv_heads, g.head_dim, g.block_tokens, torch.bfloat16, g.rule, ExtrasUsed(g.softcap, g.sinks)
            )
            for backend in usable:
                if check.left_s() <= 0 or backend.obstacle(check, shape):
                    why = backend.obstacle(check, shape) or "the time was over"
                    found["left_out"].append(f"{backend.name}, {g}: {why}")
                    continue
                try:
                    one = measure(check, backend, g)
                except Exception as error:
                    if not check.device_works():
                        found["broke_the_device"] = backend.name
                        raise
                    failures.append(f"{backend.name}, {g}: {type(error).__name__}: {error}")
                    continue
                one["decode_share_of_copy"] = share(one["decode_gb_per_s"], ceilings.get("copy_gb_per_s"))
                one["prompt_share_of_matmul"] = share(one["prompt_tflops"], ceilings.get("matmul_tflops"))
                found[f"{backend.name}, {g}"] = one
                rows.append((backend.name, f"{g.heads}x{g.kv_heads}x{g.head_dim} {kind_of(g)}", *one.values()))
            check.free_memory()
    header = ("decode ms", "GB/s", "prompt ms", "TFLOP/s", "of copy", "of matmul")
    check.table(("attention, one layer, bfloat16", "", *header), rows)
    if failures:
        raise CheckFailed("; ".join(failures[:5]))


def share(rate: float, ceiling: float | None) -> float | None:
    return None if ceiling is None else significant(rate / ceiling, 3)


def measure(check: Check, backend: Found, g: Geometry) -> dict[str, Any]:
    """Bytes are those of keys and values that a rule looks at, products those of its pairs of tokens."""
    decodes, prompt = (TINY_DECODES, TINY_PROMPT) if check.tiny else (DECODES, PROMPT)
    planes, values = (1, g.rule.values) if g.rule.values else (2, g.head_dim)
    looked_at = sum(start + 1 - g.rule.first(start) for _, start in decodes)
    pairs = sum(p + 1 - g.rule.first(p) for new, _ in prompt for p in range(new))
    decode_s = check.seconds(attending(check, backend, g, decodes), 3 if check.tiny else 20)
    prompt_s = check.seconds(attending(check, backend, g, prompt), 3 if check.tiny else 10)
    return {
        "decode_ms": significant(decode_s * 1e3),
        "decode_gb_per_s": significant(looked_at * planes * g.kv_heads * g.head_dim * 2 / decode_s / 1e9),
        "prompt_ms": significant(prompt_s * 1e3),
        "prompt_tflops": significant(2 * g.heads * (g.head_dim + values) * pairs / prompt_s / 1e12),
    }


def attending(
    check: Check, backend: Found, g: Geometry, batch: tuple[tuple[int, int], ...]
) -> Callable[[], torch.Tensor]:
    case = make_case(check, g, batch, torch.bfloat16)
    step = backend.backend.prepare(case.pool, case.chunks, case.rule)
    scaling = g.head_dim**-0.5
    return lambda: step.attend(1, case.query, case.key, case.value, scaling, case.extras)
