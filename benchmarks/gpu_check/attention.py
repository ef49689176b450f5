"""Every attention backend against plain attention in float32, and what it writes into the pool to the byte.

The reference shares no code with any backend: it walks each sequence's block table and multiplies, without tiles,
fused kernels or TF32. Both see the same numbers, rounded to the pool's type before.
"""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_check.backends import Found, find_backends
from benchmarks.gpu_check.context import Check, CheckFailed, significant

# Largest absolute difference, for values about 1. TF32 in a float32 kernel would show as about 1e-3.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Geometry:
    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int


GEOMETRIES = (
    Geometry(32, 8, 128, 32),
    Geometry(32, 8, 64, 32),
    Geometry(32, 4, 128, 16),
    Geometry(16, 16, 128, 64),
    Geometry(9, 3, 64, 32),
    Geometry(32, 8, 128, 256),  # flash_attn's pages
)
TINY_GEOMETRIES = (Geometry(4, 2, 16, 8), Geometry(3, 1, 32, 16))

# New tokens and context before them, by sequence; decodes first, as the runner packs them.
BATCHES: dict[str, tuple[tuple[int, int], ...]] = {
    "one decode": ((1, 700),),
    "decodes": tuple((1, start) for start in (1, 31, 32, 33, 100, 255, 511, 512, 1000, 1500, 2047, 3000)),
    "prompts": ((1, 0), (33, 0), (512, 0), (1000, 0)),
    "chunks": ((2, 40), (64, 64), (500, 700), (31, 1)),
    "mixed": ((1, 64), (1, 900), (1, 2000), (300, 0), (128, 333)),
}
TINY_BATCHES: dict[str, tuple[tuple[int, int], ...]] = {
    "decodes": ((1, 1), (1, 7), (1, 8), (1, 40)),
    "prompts": ((1, 0), (33, 0)),
    "mixed": ((1, 20), (17, 0), (9, 11)),
}


@dataclass(slots=True)
class Case:
    pool: torch.Tensor
    chunks: list[Any]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def make_case(check: Check, g: Geometry, batch: tuple[tuple[int, int], ...], dtype: torch.dtype) -> Case:
    from engine.attention.interface import Chunk

    needed = [-(-(new + start) // g.block_tokens) for new, start in batch]
    ids = list(range(sum(needed) + 3))  # three blocks belong to nobody: they must stay as they are
    random.Random(5).shuffle(ids)
    chunks, row = [], 0
    for (new, start), count in zip(batch, needed, strict=True):
        chunks.append(Chunk(row, new, start, [ids.pop() for _ in range(count)]))
        row += new
    generator = torch.Generator(check.device).manual_seed(7)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=check.device).to(dtype)

    pool = normal(sum(needed) + 3, 2, 2, g.kv_heads, g.block_tokens, g.head_dim)
    # As transformers hands them over: views of [1, T, heads, head_dim].
    query, key, value = (normal(1, row, n, g.head_dim).transpose(1, 2) for n in (g.heads, g.kv_heads, g.kv_heads))
    return Case(pool, chunks, query, key, value)


def reference(case: Case, layer: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool afterwards, and the output [1, T, heads, head_dim] in float32."""
    pool = case.pool.clone()
    block_tokens = pool.shape[4]
    _, heads, rows, head_dim = case.query.shape
    group = heads // case.key.shape[1]
    output = torch.empty(1, rows, heads, head_dim, device=pool.device)
    for chunk in case.chunks:
        new = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
        total = chunk.start + chunk.num_tokens
        positions = torch.arange(total, device=pool.device)
        blocks = torch.tensor(chunk.block_ids, device=pool.device)[positions // block_tokens]
        slots = positions % block_tokens
        own = slice(chunk.start, total)
        pool[blocks[own], layer, 0, :, slots[own]] = case.key[0, :, new].transpose(0, 1)
        pool[blocks[own], layer, 1, :, slots[own]] = case.value[0, :, new].transpose(0, 1)
        k = pool[blocks, layer, 0, :, slots].float().repeat_interleave(group, dim=1)  # [total, heads, head_dim]
        v = pool[blocks, layer, 1, :, slots].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("hqd,khd->hqk", case.query[0, :, new].float(), k) * scaling
        hidden = positions[None, :] > positions[own, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        output[0, new] = torch.einsum("hqk,khd->qhd", weights, v)
    return pool, output


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Whatever the process allows elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compare(found: Found, case: Case, expected: tuple[torch.Tensor, torch.Tensor], scaling: float) -> tuple[float, str]:
    """Largest difference, and what is wrong besides."""
    pool = case.pool.clone()
    output = found.backend.prepare(pool, case.chunks).attend(1, case.query, case.key, case.value, scaling)
    if output.shape != expected[1].shape:
        return float("inf"), f"its output has shape {tuple(output.shape)}"
    if not torch.equal(pool, expected[0]):
        return float("inf"), "it wrote other bytes into the pool than keys and values of the new tokens"
    return (output.float() - expected[1]).abs().max().item(), ""


def attention(check: Check, found: dict[str, Any]) -> None:
    geometries, batches = (TINY_GEOMETRIES, TINY_BATCHES) if check.tiny else (GEOMETRIES, BATCHES)
    backends = find_backends(check)
    found["not_run"] = {b.name: b.absent for b in backends if b.absent}
    for name, why in found["not_run"].items():
        check.say(f"attention: {name} is left out: {why}")
    usable = [b for b in backends if not b.absent]
    worst: dict[tuple[str, str], float] = {}
    cases: dict[str, int] = {b.name: 0 for b in usable}
    problems: list[str] = []
    found["problems"] = problems
    not_served: dict[str, set[str]] = {}
    left_out = 0
    with torch.inference_mode(), exact_float32():
        for dtype in LIMITS:
            for g in geometries:
                for batch_name, batch in batches.items():
                    if check.left_s() < 0:
                        left_out += 1
                        continue
                    case = make_case(check, g, batch, dtype)
                    scaling = g.head_dim**-0.5
                    expected = reference(case, 1, scaling)
                    for backend in usable:
                        if why := backend.obstacle(check, g.heads, g.kv_heads, g.head_dim, g.block_tokens, dtype):
                            not_served.setdefault(backend.name, set()).add(why)
                            continue
                        where = f"{backend.name}, {dtype}, {g}, {batch_name}"
                        key = (backend.name, str(dtype).removeprefix("torch."))
                        try:
                            difference, why = compare(backend, case, expected, scaling)
                        except Exception:
                            problems.append(f"{where}:\n{traceback.format_exc(limit=-4)}")
                            if not check.device_works():
                                found["broke_the_device"] = backend.name
                                raise
                            continue
                        cases[backend.name] += 1
                        worst[key] = max(worst.get(key, 0.0), difference)
                        if why or not difference <= LIMITS[dtype]:  # a NaN is no agreement
                            problems.append(f"{where}: {why or f'differs by {difference:.3g}'}")
            check.say(f"attention: {dtype} done, {len(problems)} problems")
    found["cases"] = cases
    found["not_served"] = {name: sorted(reasons) for name, reasons in not_served.items()}
    found["cases_left_out_for_time"] = left_out
    found["largest_difference"] = {f"{n}, {d}": significant(v, 3) for (n, d), v in worst.items()}
    check.table(
        ("attention against float32", "dtype", "largest difference", "limit"),
        [(n, d, f"{v:.2e}", f"{LIMITS[getattr(torch, d)]:.0e}") for (n, d), v in worst.items()],
    )
    if problems:
        raise CheckFailed(f"{len(problems)} cases are wrong; the first:\n" + "\n".join(problems[:3]))
    if not worst:
        raise CheckFailed("the time was over before the first case; raise --budget-s")
