"""Every attention backend against softmax(Q K^T / sqrt(d)) V written out in float64, one sequence at a time.

Triton's kernels run in its interpreter where there is no GPU (and then with small tiles, so that short contexts cross
their borders), natively where there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engine.attention.choose import AttentionShape, obstacle_to, trial_of_attention
from engine.attention.flash_attn_paged import FlashAttnBackend
from engine.attention.flashinfer_paged import FlashInferBackend
from engine.attention.gather import GatherBackend
from engine.attention.interface import PLAIN, AttentionBackend, Chunk, Extras, ExtrasUsed
from engine.attention.invariant import InvariantBackend
from engine.attention.native import NativeBackend
from engine.config import EngineConfig
from engine.native.build import LEVELS
from engine.native.choose import native_attention
from engine.native.library import DTYPES, load_library
from kv_transfer.layout import FULL, Rule
from tests.support import attention_libraries, native_levels
from tests.support.tiers import tiered
from tests.support.triton_interpreter import ON_GPU

from engine.attention.triton_paged import FEW_TOKENS, Sizes, TritonBackend  # isort: skip  (after the interpreter)

DEVICE = "cuda" if ON_GPU else "cpu"
SMALL = Sizes(rows=32, few_rows=16, keys=16, split_tokens=32)
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LAYERS, LAYER = 3, 1


@dataclass(frozen=True)
class Case:
    """`sequences`: (new tokens, tokens already in the pool), decodes first as the runner packs them."""

    sequences: tuple[tuple[int, int], ...]
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    block_tokens: int = 16
    dtype: torch.dtype = torch.float32
    spare_blocks: int = 3  # a table may be longer than its context: reserved room
    rule: Rule = FULL
    softcap: float = 0.0
    sinks: bool = False


@dataclass
class Step:
    pool: torch.Tensor
    chunks: list[Chunk]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rule: Rule = FULL
    extras: Extras = PLAIN

    @property
    def scaling(self) -> float:
        return self.query.shape[-1] ** -0.5

    def run(self, backend: AttentionBackend, pool: torch.Tensor | None = None) -> torch.Tensor:
        batch = backend.prepare(self.pool if pool is None else pool, self.chunks, self.rule)
        return batch.attend(LAYER, self.query, self.key, self.value, self.scaling, self.extras)

    def only(self, index: int) -> Step:
        chunk = self.chunks[index]
        rows = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
        cut = [t[:, :, rows] for t in (self.query, self.key, self.value)]
        return Step(self.pool, [replace(chunk, first_row=0)], *cut, self.rule, self.extras)

    def decode(self, index: int, place: int) -> Step:
        """One token of a chunk as a decode. Its chunk stands in the pool."""
        chunk = self.chunks[index]
        row = chunk.first_row + place
        cut = [t[:, :, row : row + 1] for t in (self.query, self.key, self.value)]
        return Step(self.pool, [Chunk(0, 1, chunk.start + place, chunk.block_ids)], *cut, self.rule, self.extras)


def build(case: Case, seed: int = 0) -> Step:
    """A pool full of other sequences' numbers; scattered tables; prefixes in place, new tokens not yet. Blocks that a
    rule has left are -1 in the tables; nobody reads the NaN in them.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(DEVICE)

    needs = [-(-(new + start) // case.block_tokens) + case.spare_blocks for new, start in case.sequences]
    planes = 1 if case.rule.values else 2
    pool = normal(sum(needs) + 5, LAYERS, planes, case.kv_heads, case.block_tokens, case.head_dim)
    free = torch.randperm(len(pool), generator=generator).tolist()
    chunks: list[Chunk] = []
    row = 0
    for (new, start), need in zip(case.sequences, needs, strict=True):
        table = [free.pop() for _ in range(need)]
        left = case.rule.first_block(start, case.block_tokens)
        pool[table[:left]] = float("nan")
        chunks.append(Chunk(row, new, start, [-1] * left + table[left:]))
        row += new

    def packed(heads: int) -> torch.Tensor:  # as transformers hands it over: a transposed view
        return normal(1, row, heads, case.head_dim).transpose(1, 2)

    heads = case.kv_heads * case.group
    new = packed(heads), packed(case.kv_heads), packed(case.kv_heads)
    extras = Extras(case.softcap, normal(heads) if case.sinks else None) if case.softcap or case.sinks else PLAIN
    return Step(pool, chunks, *new, case.rule, extras)


def expected(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """The answer in float64 [1, T, heads, value_dim], and the pool with exactly the new tokens written."""
    pool, rule = step.pool.clone(), step.rule
    _, heads, num_tokens, head_dim = step.query.shape
    _, _, planes, kv_heads, block_tokens, _ = pool.shape
    values = rule.values or head_dim
    answer = torch.empty(1, num_tokens, heads, values, device=pool.device, dtype=torch.float64)
    for chunk in step.chunks:
        rows = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
        positions = torch.arange(chunk.start + chunk.num_tokens, device=pool.device)
        blocks = torch.tensor(chunk.block_ids, device=pool.device)[positions // block_tokens]
        slots = positions % block_tokens
        for half, new in zip(range(planes), (step.key, step.value), strict=False):
            pool[blocks[chunk.start :], LAYER, half, :, slots[chunk.start :]] = new[0, :, rows].transpose(0, 1)
        there = blocks >= 0
        for row in range(rows.start, rows.stop):
            position = chunk.start + row - rows.start
            seen = there & (positions <= position) & (positions >= rule.first(position))
            k, v = (pool[blocks[seen], LAYER, half, :, slots[seen]].double() for half in (0, planes - 1))
            k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v[..., :values]))
            scores = torch.einsum("hd,nhd->hn", step.query[0, :, row].double(), k) * step.scaling
            if step.extras.softcap:
                scores = step.extras.softcap * torch.tanh(scores / step.extras.softcap)
            weights = scores.exp()
            total = weights.sum(-1)
            if step.extras.sinks is not None:
                total = total + step.extras.sinks.double().exp()
            answer[0, row] = torch.einsum("hn,nhd->hd", weights, v) / total[:, None]
    return answer, pool


def check(backend: AttentionBackend, step: Step) -> None:
    if isinstance(backend, InvariantBackend) and 512 % step.pool.shape[-2]:
        with pytest.raises(ValidationError, match="divide 512"):
            EngineConfig(batch_invariant=True, block_tokens=step.pool.shape[-2])
        return
    if isinstance(backend, NativeBackend) and step.pool.dtype not in DTYPES:
        assert "computes in float32 and bfloat16" in str(native_attention(backend._library, shape_of(step)))
        return
    if why := unable(backend, step):
        assert "does not serve" in why
        return
    answer, pool = expected(step)
    given = step.run(backend)
    assert given.shape == answer.shape
    assert given.dtype == step.query.dtype
    assert (given - answer).abs().max().item() <= LIMITS[step.pool.dtype]
    assert torch.equal(step.pool.nan_to_num(9e9), pool.nan_to_num(9e9)), "something else was written"


def unable(backend: AttentionBackend, step: Step) -> str | None:
    """What a library cannot do is said before anybody tries."""
    if not isinstance(backend, FlashInferBackend | FlashAttnBackend):
        return None
    shape = replace(shape_of(step), dtype=torch.bfloat16, block_tokens=256, head_dim=64)
    return obstacle_to(backend.name, (9, 0), shape, installed=True)


def shape_of(step: Step) -> AttentionShape:
    _, _, _, kv_heads, block_tokens, head_dim = step.pool.shape
    used = ExtrasUsed.of(step.extras)
    return AttentionShape(step.query.shape[1], kv_heads, head_dim, block_tokens, step.pool.dtype, step.rule, used)


class FlashAttnOfAnyPage:
    flash_attn_varlen_func = staticmethod(partial(attention_libraries.flash_attn_varlen_func, page_multiple=1))


BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "gather": GatherBackend,
    "invariant": InvariantBackend,
    "triton": lambda: TritonBackend(SMALL),
    **{f"native, {isa}": lambda isa=isa: NativeBackend(native_levels.library(isa)) for isa in LEVELS},
    # What they call is replaced: see tests/support/attention_libraries.py.
    "flashinfer": lambda: FlashInferBackend(attention_libraries),
    "flash_attn": lambda: FlashAttnBackend(FlashAttnOfAnyPage),
}
if ON_GPU:
    for name in [name for name in BACKENDS if name.startswith(("native", "flash"))]:
        del BACKENDS[name]  # of the CPU


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return BACKENDS[request.param]()


@pytest.fixture(params=[name for name in BACKENDS if name.startswith(("triton", "native"))])
def paged(request: pytest.FixtureRequest) -> AttentionBackend:
    """Backends of our own, which promise more than the interface asks."""
    return BACKENDS[request.param]()


@pytest.fixture(params=[name for name in BACKENDS if not name.startswith("flash")])
def ours(request: pytest.FixtureRequest) -> AttentionBackend:
    return BACKENDS[request.param]()


DECODE = ((1, 1), (1, 15), (1, 16), (1, 31), (1, 32), (1, 63), (1, 90))
MIXED = ((1, 40), (1, 3), (5, 27), (19, 17), (33, 0), (1, 0))

CASES = {
    "decode at every border": Case(DECODE),
    "one decode": Case(((1, 20),)),
    "prompts": Case(((1, 0), (15, 0), (16, 0), (17, 0), (40, 0))),
    "a prompt of one token": Case(((1, 0),)),
    "chunks after a prefix": Case(((16, 16), (20, 1), (9, 32), (12, 47))),
    "verify": Case(((2, 30), (3, 31), (5, 62), (8, 9), (4, 1))),
    "verify, many heads a key head": Case(((8, 29), (3, 5)), kv_heads=1, group=7),
    "mixed": Case(MIXED),
    "very different lengths": Case(((1, 300), (1, 1), (2, 170), (60, 0), (1, 0), (3, 1))),
    "as many heads as key heads": Case(MIXED, kv_heads=3, group=1),
    "three heads a key head": Case(MIXED, kv_heads=3, group=3),
    "eight heads a key head": Case(MIXED, kv_heads=1, group=8),
    "one key head, twenty heads": Case(MIXED, kv_heads=1, group=20),
    "head_dim 80": Case(MIXED, head_dim=80),
    "head_dim 96": Case(MIXED, head_dim=96),
    "head_dim 128": Case(MIXED, head_dim=128),
    "head_dim 256": Case(MIXED, head_dim=256, kv_heads=1),
    "head_dim 8": Case(MIXED, head_dim=8),
    "blocks of 1": Case(MIXED, block_tokens=1),
    "blocks of 7": Case(MIXED, block_tokens=7),
    "blocks of 48": Case(MIXED, block_tokens=48),
    "blocks of 256": Case(MIXED, block_tokens=256, spare_blocks=0),
    "bfloat16": Case(MIXED, dtype=torch.bfloat16),
    "bfloat16, head_dim 80, blocks of 5": Case(MIXED, head_dim=80, block_tokens=5, dtype=torch.bfloat16),
    "float16": Case(MIXED, dtype=torch.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_attention(backend: AttentionBackend, name: str) -> None:
    check(backend, build(CASES[name]))


# Windows and chunks that begin and end inside blocks, at their borders, and before the first token.
RULES = {
    "window 20": Case(MIXED, rule=Rule(window=20)),
    "window 1": Case(DECODE, rule=Rule(window=1)),
    "window of whole blocks, soft cap": Case(MIXED, rule=Rule(window=32), softcap=1.5),
    "window 5, sinks, blocks of 1": Case(MIXED, rule=Rule(window=5), sinks=True, block_tokens=1),
    "window longer than any context": Case(MIXED, rule=Rule(window=500), kv_heads=1, group=3),
    "window, verify": Case(((2, 30), (3, 31), (5, 62), (8, 9), (4, 1)), rule=Rule(window=18), kv_heads=1, group=5),
    "window, bfloat16, soft cap and sinks": Case(
        MIXED, rule=Rule(window=11), softcap=2.0, sinks=True, dtype=torch.bfloat16
    ),
    "chunk 24": Case(MIXED, rule=Rule(chunk=24)),
    "chunk 8, soft cap and sinks": Case(MIXED, rule=Rule(chunk=8), softcap=1.5, sinks=True, block_tokens=32),
    "chunk 48, bfloat16": Case(DECODE, rule=Rule(chunk=48), dtype=torch.bfloat16),
    "soft cap": Case(MIXED, softcap=1.5, kv_heads=1, group=7),
    "sinks": Case(MIXED, sinks=True, head_dim=80),
    "sinks, float16": Case(MIXED, sinks=True, dtype=torch.float16),
    "latent": Case(MIXED, rule=Rule(values=48), kv_heads=1, group=5),
    "latent, odd, sinks": Case(MIXED, rule=Rule(values=33), kv_heads=1, head_dim=47, sinks=True),
    "latent, odd, bfloat16": Case(MIXED, rule=Rule(values=33), kv_heads=1, head_dim=47, dtype=torch.bfloat16),
    "latent, all of the key, window": Case(MIXED, rule=Rule(window=20, values=64), kv_heads=1, group=3),
    "latent 512 + 64": Case(((1, 40), (5, 27)), rule=Rule(values=512), kv_heads=1, group=4, head_dim=576),
    "latent 512 + 64, bfloat16, soft cap": Case(
        ((1, 40), (17, 0)), rule=Rule(values=512), kv_heads=1, group=16, head_dim=576, softcap=1.5, dtype=torch.bfloat16
    ),
    "head_dim 33": Case(MIXED, head_dim=33),
    "head_dim 33, bfloat16": Case(MIXED, head_dim=33, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_and_extras(backend: AttentionBackend, name: str) -> None:
    check(backend, build(RULES[name]))


@pytest.mark.parametrize("name", ["window 20", "window of whole blocks, soft cap", "chunk 24", "sinks", "latent"])
def test_trials_try_rules_and_extras(backend: AttentionBackend, name: str) -> None:
    """What an engine tries at start passes, and finds out a backend that leaves the rule or an extra out."""
    step = build(RULES[name])
    if unable(backend, step):
        return
    shape = replace(shape_of(step), block_tokens=64)
    device = torch.device(DEVICE)
    if not isinstance(backend, TritonBackend):  # the interpreter is slow
        assert trial_of_attention(backend, device, shape) is None

    class Leaves(GatherBackend):
        def prepare(self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL) -> Any:
            whole = [replace(c, block_ids=[max(0, b) for b in c.block_ids]) for c in chunks]
            batch = super().prepare(kv, whole, Rule(values=rule.values))
            return SimpleNamespace(attend=lambda *given: batch.attend(*given[:5]))

    if name != "latent":
        assert "differs from gather" in str(trial_of_attention(Leaves(), device, shape))


@pytest.mark.parametrize("seed", range(6))
def test_random_batches(backend: AttentionBackend, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    sequences = [(1, draw(1, 80)) for _ in range(draw(0, 4))]
    sequences += [(draw(1, 30), draw(0, 1) * draw(1, 60)) for _ in range(draw(1, 3))]
    sequences.sort(key=lambda s: not (s[0] == 1 and s[1] > 0))
    case = Case(
        tuple(sequences), draw(1, 3), draw(1, 5), (16, 64, 80)[draw(0, 2)], draw(1, 40), spare_blocks=draw(0, 2)
    )
    check(backend, build(case, seed))


def test_scores_far_from_zero_stay_finite(backend: AttentionBackend) -> None:
    step = build(Case(MIXED))
    step.query *= 100
    answer, _ = expected(step)
    given = step.run(backend)
    assert torch.isfinite(given).all()
    assert (given - answer).abs().max().item() < 1e-3


def test_layers_do_not_meet(backend: AttentionBackend) -> None:
    """One prepared step serves all layers, in any order. Near, not equal: libraries may round by how memory lies."""
    step = build(Case(((1, 20), (6, 11))))
    others = step.pool.clone()
    batch = backend.prepare(step.pool, step.chunks)
    first = batch.attend(LAYER, step.query, step.key, step.value, step.scaling)
    batch.attend(2, step.query, step.key, step.value, step.scaling)
    again = batch.attend(LAYER, step.query, step.key, step.value, step.scaling)
    assert (again - first).abs().max().item() <= LIMITS[torch.float32]
    assert torch.equal(step.pool[:, 0], others[:, 0])


@pytest.mark.skipif(ON_GPU, reason="the library is replaced")
def test_flashinfer_plans_once_a_step_and_never_over_a_plan_in_use() -> None:
    """With overlapping steps the next plan is made while this one's tables may still be on their way."""
    backend = FlashInferBackend(attention_libraries)
    step = build(Case(((1, 20), (6, 11))))
    first, second = (backend.prepare(step.pool, step.chunks) for _ in range(2))
    for layer in range(LAYERS):
        first.attend(layer, step.query, step.key, step.value, step.scaling)
    used = first._wrappers
    assert [wrapper.plans for wrapper in used] == [1, 1]
    second.attend(0, step.query, step.key, step.value, step.scaling)
    assert not set(map(id, used)) & set(map(id, second._wrappers))
    third = backend.prepare(step.pool, step.chunks)
    third.attend(0, step.query, step.key, step.value, step.scaling)
    assert third._wrappers == used, "that step has been waited for"


# Promises of our own backends.


def test_sizes_of_production() -> None:
    """Sizes.of, over its split border."""
    check(TritonBackend(), build(Case(((1, 255), (1, 256), (4, 510), (70, 40)), group=3)))


def test_pool_with_any_block_stride() -> None:
    """The pool may be a view into something wider: here every second block, and keys of a longer head."""
    step = build(Case(MIXED))
    n, layers, halves, heads, tokens, dim = step.pool.shape
    wide = torch.full((2 * n, layers, halves, heads, tokens, dim + 16), 7.0, device=DEVICE)
    pool = wide[::2, ..., :dim]
    pool.copy_(step.pool)
    answer, written = expected(step)
    assert (step.run(TritonBackend(SMALL), pool) - answer).abs().max().item() <= LIMITS[torch.float32]
    assert torch.equal(pool, written)
    assert (wide[1::2] == 7).all()
    assert (wide[::2, ..., dim:] == 7).all()


@pytest.mark.parametrize("sequences", [MIXED, ((1, 3), (1, 60), (7, 20))])
def test_reads_nothing_but_its_own_tokens(ours: AttentionBackend, sequences: tuple[tuple[int, int], ...]) -> None:
    """NaN everywhere else, in the same block too: none reaches an answer."""
    step = build(Case(sequences))
    answer, pool = expected(step)
    poisoned = torch.full_like(pool, float("nan"))
    for chunk in step.chunks:
        positions = torch.arange(chunk.start, device=DEVICE)
        blocks = torch.tensor(chunk.block_ids, device=DEVICE)[positions // 16]
        poisoned[blocks, LAYER, :, :, positions % 16] = pool[blocks, LAYER, :, :, positions % 16]
    assert (step.run(ours, poisoned) - answer).abs().max().item() <= LIMITS[torch.float32]


@pytest.mark.parametrize(
    ("dtype", "rule"),
    [
        (torch.float32, FULL),
        (torch.bfloat16, FULL),
        (torch.bfloat16, Rule(window=13)),
        (torch.float32, Rule(chunk=24)),
        (torch.bfloat16, Rule(values=40)),
    ],
    ids=str,
)
def test_a_token_does_not_depend_on_its_neighbours(paged: AttentionBackend, dtype: torch.dtype, rule: Rule) -> None:
    """Bit for bit: each sequence alone gives what it gives in the batch."""
    step = build(Case(MIXED, dtype=dtype, rule=rule, sinks=rule.leaves, kv_heads=1 if rule.values else 2))
    together = step.run(paged)
    for index, chunk in enumerate(step.chunks):
        alone = step.only(index).run(paged)
        assert torch.equal(alone[0], together[0, chunk.first_row : chunk.first_row + chunk.num_tokens]), index


@pytest.mark.parametrize(
    ("dtype", "rule"), [(torch.float32, FULL), (torch.bfloat16, FULL), (torch.float32, Rule(window=29))], ids=str
)
def test_verified_tokens_are_the_decoded_ones(paged: AttentionBackend, dtype: torch.dtype, rule: Rule) -> None:
    """Bit for bit: FEW_TOKENS at once give what one after another gives, over a split's border too."""
    step = build(Case(((FEW_TOKENS, 59),), kv_heads=1, group=5, dtype=dtype, rule=rule, sinks=rule.leaves))
    verified = step.run(paged)
    for i in range(FEW_TOKENS):
        assert torch.equal(step.decode(0, i).run(paged)[0, 0], verified[0, i]), i


LONG = ((1, 1023), (1, 1024), (1, 3001), (90, 2040), (3, 1023))


@pytest.mark.skipif(ON_GPU, reason="of the CPU")
@pytest.mark.parametrize("dtype", tiered([torch.bfloat16], [torch.float32]))
@native_levels.EVERY_LEVEL
def test_native_contexts_of_many_parts(isa: str, dtype: torch.dtype) -> None:
    """Decodes whose parts several threads compute, beside chunks that walk them alone: bit for bit the same."""
    backend = NativeBackend(native_levels.library(isa))
    step = build(Case(LONG, group=3, block_tokens=32, dtype=dtype))
    check(backend, step)
    together = step.run(backend)
    for row in (0, 7, 8, 89):
        assert torch.equal(step.decode(3, row).run(backend)[0, 0], together[0, step.chunks[3].first_row + row]), row


LESS = ((1, 1023), (1, 2100), (30, 1500), (3, 1023))
LONG_RULES = {
    "window 600": Case(LESS, rule=Rule(window=600), softcap=1.5, block_tokens=32),
    "window 2000, bfloat16": Case(LESS, rule=Rule(window=2000), sinks=True, block_tokens=32, dtype=torch.bfloat16),
    "chunk 1500": Case(LESS, rule=Rule(chunk=1500), sinks=True, block_tokens=32),
    "latent, bfloat16": Case(
        ((1, 1500), (9, 1100)), rule=Rule(values=96), kv_heads=1, head_dim=128, sinks=True, dtype=torch.bfloat16
    ),
}


@pytest.mark.skipif(ON_GPU, reason="of the CPU")
@pytest.mark.parametrize("kind", ["native", "invariant"])
@pytest.mark.parametrize("name", LONG_RULES)
def test_long_contexts_under_rules(kind: str, name: str) -> None:
    """On native kernels a token in a chunk has the bits that it has decoded alone, wherever windows, tiles and parts
    begin. Torch's bits are its processor's, and tried at start.
    """
    backend = NativeBackend(load_library(2)) if kind == "native" else InvariantBackend()
    step = build(LONG_RULES[name])
    check(backend, step)
    together = step.run(backend)
    for index, chunk in enumerate(step.chunks if kind == "native" else ()):
        for place in {0, chunk.num_tokens // 2, chunk.num_tokens - 1}:
            alone = step.decode(index, place).run(backend)[0, 0]
            assert torch.equal(alone, together[0, chunk.first_row + place]), (index, place)


def test_refuses_what_does_not_fit() -> None:
    step = build(Case(((1, 20), (6, 11))))
    backend = TritonBackend(SMALL)
    with pytest.raises(ValueError, match="fewer blocks"):
        backend.prepare(step.pool, [replace(step.chunks[0], block_ids=[1])])
    with pytest.raises(ValueError, match="without chunks"):
        backend.prepare(step.pool, [])
    with pytest.raises(ValueError, match="head_dim"):
        backend.prepare(step.pool.transpose(-1, -2), step.chunks)
    with pytest.raises(ValueError, match="do not fit"):
        backend.prepare(step.pool, step.chunks[:1]).attend(LAYER, step.query, step.key, step.value, 1.0)
    with pytest.raises(ValueError, match="multiple"):
        Sizes(16, 16, 16, 40)


@pytest.mark.long
def test_kernels_compile_for_gpus() -> None:
    """To machine code, without a GPU, within the shared memory of every GPU since compute capability 8.0."""
    root = Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_kernels"],
        cwd=root, env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
