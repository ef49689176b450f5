"""Every attention backend against plain attention in float32, and what it writes into the pool to the byte.

The reference shares no code with any backend: it walks each sequence's block table and multiplies, without tiles,
fused kernels or TF32. Both see the same numbers, rounded to the pool's type before.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_check.backends import Found, find_backends
from benchmarks.gpu_check.context import Check, CheckFailed, significant
from engine.attention.choose import AttentionShape
from engine.attention.interface import PLAIN, Chunk, Extras, ExtrasUsed
from kv_transfer.layout import FULL, Rule

# Largest absolute difference, for values about 1. TF32 in a float32 kernel would show as about 1e-3.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


SOFT_CAP = 2.0  # of scores about 1


@dataclass(frozen=True, slots=True)
class Geometry:
    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    rule: Rule = FULL
    softcap: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        extras = " and ".join([*["soft cap"] * self.softcap, *["sinks"] * self.sinks])
        sizes = f"{self.heads}x{self.kv_heads}x{self.head_dim}, blocks of {self.block_tokens}, {self.rule}"
        return f"{sizes}, {extras}" if extras else sizes


GEOMETRIES = (
    Geometry(32, 8, 128, 32),
    Geometry(32, 8, 64, 32),
    Geometry(64, 8, 64, 32, Rule(window=128), sinks=True),  # gpt-oss
    Geometry(128, 1, 576, 32, Rule(values=512)),  # DeepSeek V3
    Geometry(16, 8, 256, 32, Rule(window=512), softcap=True),  # Gemma 2
    Geometry(40, 8, 128, 32, Rule(chunk=512)),  # Llama 4
    Geometry(32, 8, 128, 256, Rule(window=300), softcap=True),  # flash_attn's pages
    Geometry(64, 8, 64, 32, sinks=True),
    Geometry(16, 1, 576, 16, Rule(values=512)),
    Geometry(32, 4, 128, 16),
    Geometry(16, 16, 128, 64),
    Geometry(9, 3, 64, 32),
    Geometry(32, 8, 128, 256),
)
TINY_GEOMETRIES = (
    Geometry(4, 2, 16, 8),
    Geometry(3, 1, 32, 16),
    Geometry(4, 2, 16, 8, Rule(window=12), sinks=True),
    Geometry(4, 2, 16, 8, Rule(chunk=16), softcap=True),
    Geometry(4, 1, 24, 8, Rule(values=16)),
)

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
    chunks: list[Chunk]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rule: Rule
    extras: Extras


def make_case(check: Check, g: Geometry, batch: tuple[tuple[int, int], ...], dtype: torch.dtype) -> Case:
    """What a rule has left is -1 in the tables, and large numbers in the pool, where it lay."""
    needed = [-(-(new + start) // g.block_tokens) for new, start in batch]
    ids = list(range(sum(needed) + 3))  # three blocks belong to nobody: they must stay as they are
    random.Random(5).shuffle(ids)
    generator = torch.Generator(check.device).manual_seed(7)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=check.device).to(dtype)

    pool = normal(len(ids), 2, 1 if g.rule.values else 2, g.kv_heads, g.block_tokens, g.head_dim)
    chunks, row = [], 0
    for (new, start), count in zip(batch, needed, strict=True):
        table = [ids.pop() for _ in range(count)]
        left = g.rule.first_block(start, g.block_tokens)
        pool[table[:left]] = 1e4
        chunks.append(Chunk(row, new, start, [-1] * left + table[left:]))
        row += new
    # As transformers hands them over: views of [1, T, heads, head_dim].
    query, key, value = (normal(1, row, n, g.head_dim).transpose(1, 2) for n in (g.heads, g.kv_heads, g.kv_heads))
    extras = PLAIN
    if g.softcap or g.sinks:
        extras = Extras(SOFT_CAP if g.softcap else 0.0, normal(g.heads) if g.sinks else None)
    return Case(pool, chunks, query, key, value, g.rule, extras)


def reference(case: Case, layer: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool afterwards, and the output [1, T, heads, head_dim] in float32; of a latent group [..., values]."""
    pool = case.pool.clone()
    planes, block_tokens = pool.shape[2], pool.shape[4]
    _, heads, rows, head_dim = case.query.shape
    group = heads // case.key.shape[1]
    values = case.rule.values or head_dim
    output = torch.empty(1, rows, heads, values, device=pool.device)
    for chunk in case.chunks:
        new = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
        total = chunk.start + chunk.num_tokens
        first = case.rule.first_block(chunk.start, block_tokens) * block_tokens
        positions = torch.arange(first, total, device=pool.device)
        blocks = torch.tensor(chunk.block_ids, device=pool.device)[positions // block_tokens]
        slots = positions % block_tokens
        own = slice(chunk.start - first, total - first)
        for plane, given in zip(range(planes), (case.key, case.value), strict=False):
            pool[blocks[own], layer, plane, :, slots[own]] = given[0, :, new].transpose(0, 1)
        k = pool[blocks, layer, 0, :, slots].float().repeat_interleave(group, dim=1)  # [total, heads, head_dim]
        v = pool[blocks, layer, planes - 1, :, slots].float()[..., :values].repeat_interleave(group, dim=1)
        scores = torch.einsum("hqd,khd->hqk", case.query[0, :, new].float(), k) * scaling
        if case.extras.softcap:
            scores = case.extras.softcap * torch.tanh(scores / case.extras.softcap)
        begins = torch.tensor([case.rule.first(p) for p in range(chunk.start, total)], device=pool.device)
        hidden = (positions[None, :] > positions[own, None]) | (positions[None, :] < begins[:, None])
        scores = scores.masked_fill(hidden, -torch.inf)
        if case.extras.sinks is not None:
            sinks = case.extras.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = scores.softmax(dim=-1)[..., : len(positions)]
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
    batch = found.backend.prepare(pool, case.chunks, case.rule)
    output = batch.attend(1, case.query, case.key, case.value, scaling, case.extras)
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
    worst: dict[tuple[str, str, str], float] = {}
    cases: dict[str, int] = {b.name: 0 for b in usable}
    problems: list[str] = []
    found["problems"] = problems
    not_served: dict[str, set[str]] = {}
    left_out: dict[str, int] = {}
    with torch.inference_mode(), exact_float32():
        for g in geometries:
            for (dtype, limit), (batch_name, batch) in itertools.product(LIMITS.items(), batches.items()):
                if check.left_s() < 0:
                    left_out[str(g)] = left_out.get(str(g), 0) + 1
                    continue
                case = make_case(check, g, batch, dtype)
                scaling = g.head_dim**-0.5
                expected = reference(case, 1, scaling)
                used = ExtrasUsed(g.softcap, g.sinks)
                shape = AttentionShape(g.heads, g.kv_heads, g.head_dim, g.block_tokens, dtype, g.rule, used)
                for backend in usable:
                    if why := backend.obstacle(check, shape):
                        not_served.setdefault(backend.name, set()).add(why)
                        continue
                    where = f"{backend.name}, {dtype}, {g}, {batch_name}"
                    key = (backend.name, kind_of(g), str(dtype).removeprefix("torch."))
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
                    if why or not difference <= limit:  # a NaN is no agreement
                        problems.append(f"{where}: {why or f'differs by {difference:.3g}'}")
            check.say(f"attention: {g} done, {len(problems)} problems")
    found["cases"] = cases
    found["not_served"] = {name: sorted(reasons) for name, reasons in not_served.items()}
    found["cases_left_out_for_time"] = left_out
    found["largest_difference"] = {", ".join(key): significant(v, 3) for key, v in worst.items()}
    check.table(
        ("attention against float32", "", "dtype", "largest difference", "limit"),
        [(*key, f"{v:.2e}", f"{LIMITS[getattr(torch, key[-1])]:.0e}") for key, v in worst.items()],
    )
    if problems:
        raise CheckFailed(f"{len(problems)} cases are wrong; the first:\n" + "\n".join(problems[:3]))
    if not worst:
        raise CheckFailed("the time was over before the first case; raise --budget-s")


def kind_of(g: Geometry) -> str:
    kind = re.sub(r"\(.*\)", "", str(g.rule))
    return ", ".join([kind, *["soft cap"] * g.softcap, *["sinks"] * g.sinks])
