"""KV in 8 bits: answers are those of transformers with a cache that gives back rounded keys and values, whatever
computes them, in whatever pieces, and on whichever side of a handoff.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.choose import AttentionShape, trial_of_attention
from engine.attention.gather import GatherBackend
from engine.attention.interface import AttentionBackend, Chunk, ExtrasUsed
from engine.attention.invariant import InvariantBackend
from engine.attention.native import NativeBackend
from engine.config import EngineConfig
from engine.kv_rounding import RoundedRows, rounded
from engine.model_loader import ModelLoadError
from engine.native.library import load_library
from engine.runner import ModelRunner
from engine.types import SamplingParams, SequenceSpec
from kv_transfer.layout import FULL, Group, KvLayout, Rounding, Rule, explain_mismatch
from tests.model.test_families import saved
from tests.model.test_latent import MLA
from tests.support.native_levels import EVERY_LEVEL, library
from tests.support.plain_engine import Engine, some_prompts
from tests.support.prompts import clear_choice

BLOCK = 8
ROUNDINGS: tuple[Rounding, ...] = ("int8", "int8_values", "fp8", "fp8_values")
CHANGES: dict[str, dict[str, Any]] = {
    "Llama": {"head_dim": 20, "initializer_range": 0.1},
    "Mistral": {"sliding_window": 16, "initializer_range": 0.1},
    "Gemma2": {"sliding_window": 16, "head_dim": 20, "attn_logit_softcapping": 2.0, "initializer_range": 0.2},
    "GptOss": {
        "sliding_window": 16, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    },
    "Qwen3Next": {
        "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"],
        "initializer_range": 0.1,
    },
}  # fmt: skip


# All magnitudes, the smallest first; what would be the next one is NaN.
E4M3 = torch.tensor([m * 2.0**-9 for m in range(8)] + [m * 2.0**e for e in range(-9, 6) for m in range(8, 16)])[:-1]


def by_hand(x: torch.Tensor, rounding: str = "int8") -> torch.Tensor:
    """Each row: the nearest multiples of a bfloat16 scale, its largest magnitude / 127. Of fp8 its largest magnitude
    / 448, and the nearest of all numbers that there are, of two that are as near the one whose last bit is 0.
    """
    most = 448 if rounding.startswith("fp8") else 127
    scale = (x.float().abs().max(-1, keepdim=True).values.clamp(min=1e-20) / most).bfloat16().float()
    scaled = x.float() / scale
    if most == 127:
        return (scaled.round().clamp(-127, 127) * scale).to(x.dtype)
    size = scaled.abs().clamp(max=448.0)
    above = torch.searchsorted(E4M3, size.contiguous()).clamp(max=len(E4M3) - 1)
    below = (above - 1).clamp(min=0)
    up, down = E4M3[above] - size, size - E4M3[below]
    nearest = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (E4M3[nearest].copysign(scaled) * scale).to(x.dtype)


def greedy(path: Path, prompt: list[int], count: int, kv_dtype: str) -> list[int]:
    """transformers' own model and attention; its cache keeps rounded keys and values."""
    from transformers import AutoModelForCausalLM, DynamicCache

    class Rounded(DynamicCache):
        def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            key = key if kv_dtype.endswith("_values") else by_hand(key, kv_dtype)
            return super().update(key, by_hand(value, kv_dtype), *args, **kwargs)

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            cache = Rounded(config=model.config)
            ids.append(clear_choice(model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]))
    return ids[len(prompt) :]


def runner_of(path: Path, **settings: Any) -> ModelRunner:
    small = {"model": str(path), "dtype": "float32", "num_blocks": 48, "block_tokens": BLOCK, "threads": 1}
    return ModelRunner(EngineConfig.model_validate({**small, "device": "cpu", "kv_dtype": "int8", **settings}))


PATHS = [
    ("Llama", "native stack"),
    ("Llama", "torch"),
    ("Llama", "batch-invariant"),
    ("Mistral", "native paged"),
    ("Mistral", "torch"),
    ("Gemma2", "native paged"),
    ("Gemma2", "torch"),
    ("Gemma2", "batch-invariant"),
    ("GptOss", "native paged"),
    ("GptOss", "torch"),
    ("Qwen3Next", "native paged"),
]


@pytest.mark.parametrize(
    ("family", "path_name", "kv_dtype"),
    [
        *((*path, kv_dtype) for kv_dtype in ("int8", "int8_values") for path in PATHS),
        ("Llama", "native stack", "fp8"),
        ("Llama", "native stack", "fp8_values"),
        ("Llama", "batch-invariant", "fp8"),
        ("Mistral", "torch", "fp8_values"),
        ("Gemma2", "native paged", "fp8"),
        ("GptOss", "native paged", "fp8_values"),
        ("GptOss", "torch", "fp8"),
        ("Qwen3Next", "native paged", "fp8"),
    ],
)
def test_answers_are_those_of_a_rounded_cache(tmp_path: Path, family: str, path_name: str, kv_dtype: str) -> None:
    path = saved(tmp_path, family, **CHANGES[family])
    kernels = path_name if path_name == "torch" else "auto"
    attention = "gather" if path_name == "batch-invariant" else "auto"
    invariant = path_name == "batch-invariant"
    runner = runner_of(path, kernels=kernels, attention=attention, batch_invariant=invariant, kv_dtype=kv_dtype)
    assert path_name in runner.describe_path()
    assert f", KV in {kv_dtype}" in runner.describe_path()
    engine = Engine(runner)
    for n, prompt in some_prompts(1, 7, 45).items():
        assert engine.core.add(SequenceSpec(n, prompt, SamplingParams(max_tokens=5)), 0.0) is None
    engine.run()
    for n, prompt in some_prompts(1, 7, 45).items():
        assert engine.answers[n] == greedy(path, prompt, 5, kv_dtype), n


@pytest.mark.parametrize("family", ["Llama", "GptOss"])
def test_bfloat16_passes_the_trial(tmp_path: Path, family: str) -> None:
    """Rounding twice, to bfloat16 and to 8 bits, is what transformers does beside its rounded cache, too."""
    runner = runner_of(saved(tmp_path, family, **CHANGES[family]), dtype="bfloat16")
    assert "right at positions" in str(runner.verdicts)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_split_cached_and_local_are_the_same(tmp_path: Path, kv_dtype: str) -> None:
    """What a handoff does, without the network: blocks of one engine go on in another. Then a prefix of its cache."""
    path, prompt = saved(tmp_path, "Llama", **CHANGES["Llama"]), some_prompts(1, 7, 45)[45]
    settings = {"kernels": "torch", "kv_dtype": kv_dtype}
    prefill, decode = Engine(runner_of(path, **settings)), Engine(runner_of(path, **settings), 9)
    assert prefill.runner.facts == decode.runner.facts
    right = greedy(path, prompt, 8, kv_dtype)
    sampling = SamplingParams(max_tokens=8)
    assert prefill.core.add(SequenceSpec(1, prompt, sampling, hand_over=True, retain=True), 0.0) is None
    prefill.run()
    assert decode.core.add(SequenceSpec(1, prompt, sampling, hold=True), 0.0) is None
    room = decode.core.reserve(1, len(prompt), 0.0)
    assert room is not None
    source, target = prefill.runner.memory(), decode.runner.kv
    assert isinstance(target, torch.Tensor)
    for theirs, own in zip(prefill.core.block_table(1), room.block_ids, strict=True):
        moved = torch.frombuffer(bytearray(source.read_block(theirs)), dtype=torch.uint8)
        assert len(moved) == decode.runner.block_bytes
        target[own] = moved.view(target[own].shape)
    decode.answers[1] = list(prefill.answers[1])
    decode.core.adopt(1, len(prompt), decode.answers[1], 0.0)
    decode.run()
    assert decode.answers[1] == right
    assert decode.core.add(SequenceSpec(2, prompt, sampling), 0.0) is None
    decode.run()
    assert decode.answers[2] == right, "behind its own cache"


def test_each_scheme_is_a_model_of_its_own(tmp_path: Path) -> None:
    """So blocks of one are never found, read or moved by another."""
    path = saved(tmp_path, "Llama")
    facts = [
        runner_of(path, kernels="torch", **settings).facts
        for settings in (
            {"kv_dtype": "model"},
            {},
            {"kv_dtype": "int8_values"},
            {"quantization": "int8"},
            {"quantization": "int8", "kv_dtype": "model"},
            {"kv_dtype": "fp8"},
            {"kv_dtype": "fp8_values"},
        )
    ]
    schemes = ["", "kv int8", "kv int8_values", "int8 mlp kv int8", "int8 mlp", "kv fp8", "kv fp8_values"]
    assert [f.scheme for f in facts] == schemes
    assert len({f.identity for f in facts}) == len(facts)
    layouts = [KvLayout(f.identity, BLOCK, f.groups, f.weights) for f in facts]
    prints = [layout.fingerprint() for layout in layouts]
    assert len(set(prints)) == len(prints)
    assert "-float32-kv.int8-b8-" in prints[1]
    assert "-float32-int8.mlp-kv.int8-b8-" in prints[3]
    assert [layout.token_bytes / 2 for layout in layouts[:3]] == [2 * 2 * 16 * 4, 2 * 36, 2 * (16 * 4 + 20)]
    assert [layout.token_bytes for layout in layouts[5:]] == [layout.token_bytes for layout in layouts[1:3]]
    for own, theirs, words in (
        (5, 1, "the peer keeps its KV as int8 and this worker as fp8"),
        (0, 1, "the peer keeps its KV as int8 and this worker as model"),
        (2, 1, "the peer keeps its KV as int8 and this worker as int8_values"),
        (3, 4, "the peer keeps its KV as model and this worker as int8"),
    ):
        said = explain_mismatch(prints[own], prints[theirs])
        assert words in said
        assert "give both pools the same engine.kv_dtype" in said
    assert "engine.quantization" in explain_mismatch(prints[3], prints[1]), "what differs first is said first"


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("Youtu", MLA, "one latent vector a token"),
        ("Mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}, "keeps keys and values"),
    ],
)
def test_what_cannot_be_rounded_is_refused(tmp_path: Path, family: str, changes: dict[str, Any], words: str) -> None:
    path = saved(tmp_path, family, **changes)
    with pytest.raises(ModelLoadError, match=words):
        runner_of(path, kernels="torch")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_largest_of_float16_stays_finite(rounding: Rounding) -> None:
    most = torch.full((1, 16), torch.finfo(torch.float16).max, dtype=torch.float16)
    for kept in rounded(rounding, -most, most):
        assert kept.isfinite().all()
        assert torch.allclose(kept.abs(), most, rtol=0.01)


@pytest.mark.parametrize("rule", [FULL, Rule(window=9), Rule(chunk=24)], ids=str)
@pytest.mark.parametrize("make", [GatherBackend, InvariantBackend])
def test_what_others_left_in_a_block_reaches_no_answer(make: Any, rule: Rule) -> None:
    """Bytes of another sequence whose scale is no number, behind a sequence's own tokens."""
    rows = RoundedRows(Group(rule, (0,), 2, 8, "float32", "int8"))
    answers = []
    for left in (0, 255):
        generator = torch.Generator().manual_seed(1)
        pool = torch.full((6, 1, 1, 2, 16, rows.group.row_parts[2]), left, dtype=torch.uint8)
        for chunks in (
            [Chunk(0, 3, 0, [0]), Chunk(3, 40, 0, [1, 2, 3]), Chunk(43, 20, 0, [4, 5])],
            [Chunk(0, 1, 3, [0]), Chunk(1, 1, 40, [1, 2, 3]), Chunk(2, 7, 20, [4, 5])],
        ):
            tokens = chunks[-1].first_row + chunks[-1].num_tokens
            query, key, value = (torch.randn(1, heads, tokens, 8, generator=generator) for heads in (4, 2, 2))
            answer = make(rows).prepare(pool, chunks, rule).attend(0, query, key, value, 0.3)
        answers.append(answer)
    assert torch.equal(*answers)


def test_kernels_that_read_wide_keys_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"engine\.attention is triton, and"):
        runner_of(saved(tmp_path, "Llama"), kernels="torch", attention="triton")


# Kernels.


@EVERY_LEVEL
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_kernels_round_and_read_as_gather_does(isa: str, rounding: Rounding, dtype: str) -> None:
    """To the bit what is written, whatever the width; then what comes of it."""
    native = library(isa)
    for width, block_tokens, rule in (
        (64, 16, FULL), (80, 16, FULL), (5, 7, FULL), (16, 1, FULL), (20, 8, Rule(window=40)), (32, 8, Rule(chunk=33)),
    ):  # fmt: skip
        group = Group(rule, (0,), 2, width, dtype, rounding)
        extras = ExtrasUsed(softcap=rule.window > 0, sinks=rule.chunk > 0)
        shape = AttentionShape.of(group, 6, block_tokens, extras)
        off = trial_of_attention(NativeBackend(native, shape.rows), torch.device("cpu"), shape)
        assert off is None, (width, rule)


@EVERY_LEVEL
@pytest.mark.parametrize("width", [32, 64, 80, 640])
@pytest.mark.parametrize("rounding", ["int8", "int8_values"])
def test_whole_numbers_are_as_exact_as_bfloat16(isa: str, rounding: Rounding, width: int) -> None:
    """Of a decode and of a chunk, which differ in how they read; against what the same rows give in float64."""
    group = Group(FULL, (0,), 2, width, "bfloat16", rounding)
    rows, generator = RoundedRows(group), torch.Generator().manual_seed(1)
    tokens, heads = 1100, 6
    blocks = -(-tokens // BLOCK)
    pool = torch.zeros(blocks, *group.block_shape(BLOCK), dtype=torch.uint8)
    query, key, value = (
        torch.randn(1, n, tokens, width, generator=generator).bfloat16() for n in (heads, 2, 2)
    )  # fmt: skip
    query[..., 0] *= 30  # what is large leaves few bits for the others
    value *= torch.rand(1, 2, tokens, 1, generator=generator).exp2().bfloat16()
    attend = NativeBackend(library(isa), rows)
    split = tokens - 41
    found = []
    for start, end in ((0, split), (split, tokens - 1), (tokens - 1, tokens)):
        step = attend.prepare(pool, [Chunk(0, end - start, start, list(range(blocks)))])
        now = slice(start, end)
        found.append(step.attend(0, query[:, :, now], key[:, :, now], value[:, :, now], width**-0.5)[0])
    kept = rounded(rounding, key.float(), value.float())
    k, v = (t[0].double().repeat_interleave(3, 0) for t in kept)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    right = attended_exactly(query[0].double(), k, v, seen, width**-0.5)
    errors = (torch.cat(found).double() - right).abs() / right.abs().amax(-1, keepdim=True)
    assert errors.mean() < 2**-10
    assert errors.max() < 2**-6


def attended_exactly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scaling: float
) -> torch.Tensor:
    """[heads, tokens, width] -> [tokens, heads, width]"""
    scores = (query @ key.mT * scaling).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)


@EVERY_LEVEL
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["query", "value"])
def test_what_is_no_number_is_seen_in_the_answer(isa: str, rounding: Rounding, dtype: str, what: str) -> None:
    """And in no answer of another head."""
    rows = RoundedRows(Group(FULL, (0,), 2, 32, dtype, rounding))
    pool = torch.zeros(3, *rows.group.block_shape(BLOCK), dtype=torch.uint8)
    tensors = {name: torch.ones(1, 2, 20, 32, dtype=rows.dtype) for name in ("query", "key", "value")}
    tensors[what][0, 1, 7, 3] = float("nan")
    attend = NativeBackend(library(isa), rows)
    for start, end in ((0, 19), (19, 20)) if what != "query" else ((0, 7), (7, 8)):
        step = attend.prepare(pool, [Chunk(0, end - start, start, [2, 0, 1])])
        found = step.attend(0, *(t[:, :, start:end] for t in tensors.values()), 0.3)[0]
        assert found[:, 0].isfinite().all()
        right = start == 0 and what == "query"
        assert found[-1, 1].isfinite().all() == right


# Rows.

GROUPS: list[Group] = [
    Group(FULL, (0, 1), 2, width, dtype, rounding)
    for width in (5, 16, 20, 64)
    for dtype in ("float32", "bfloat16", "float16")
    for rounding in ROUNDINGS
]


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_rows_give_back_what_the_reference_rounds_to(group: Group) -> None:
    rows = RoundedRows(group)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(3, 2, 7, group.width, generator=generator).to(rows.dtype) for _ in range(2))
    key[0], value[0, 0] = 0.0, 1e-37  # too small to have a scale
    key[1] *= 1e4
    made = rows.of(key, value)
    assert made.dtype == torch.uint8
    assert made.shape == (3, 2, 7, group.row_bytes)
    assert group.row_bytes % 4 == 0
    k, v = rows.read(made)
    assert k.dtype == v.dtype == rows.dtype
    assert torch.equal(k, by_hand(key, group.rounding) if group.rounds_keys else key)
    assert torch.equal(v, by_hand(value, group.rounding))
    for ours, theirs in zip(rounded(group.rounding, key, value), (k, v), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(rows.of(key, value[..., :-1])[..., : group.row_parts[0]], made[..., : group.row_parts[0]])


@pytest.mark.parametrize("rounding", ["int8", "fp8"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(wrong: float, rounding: Rounding) -> None:
    rows = RoundedRows(Group(FULL, (0,), 1, 16, "float32", rounding))
    x = torch.ones(2, 16)
    x[0, 3] = wrong
    k, v = rows.read(rows.of(x, x))
    for kept in (k, v):
        assert not kept[0].isfinite().any()
        assert kept[1].isfinite().all()


def written(
    backend: AttentionBackend, group: Group, cuts: Sequence[int], key: torch.Tensor, value: torch.Tensor, together: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence's blocks, and what its tokens got, when it is computed in pieces that end at `cuts`; beside the same
    sequence in other blocks, one piece behind, if `together`.
    """
    tokens, blocks = key.shape[2], -(-key.shape[2] // BLOCK)
    pool = torch.zeros(2 * blocks, *group.block_shape(BLOCK), dtype=torch.uint8)
    spans = list(zip([0, *cuts], [*cuts, tokens], strict=True))
    tables = [list(range(2 * blocks - 1, blocks - 1, -1)), list(range(blocks))]
    answer = torch.zeros(tokens, 4, group.width, dtype=key.dtype)
    query = torch.cat((key, value), 1)
    for step in range(len(spans) + 1):
        mine = [(0, spans[step])] if step < len(spans) else []
        other = [(1, spans[step - 1])] if together and step else []
        chunks, rows = [], []
        parts = sorted([*mine, *other], key=lambda p: p[1][1] - p[1][0] > 1 or not p[1][0])
        for which, (start, end) in parts:
            chunks.append(Chunk(len(rows), end - start, start, tables[which]))
            rows += range(start, end)
        if not chunks:
            continue
        found = backend.prepare(pool, chunks, group.rule).attend(
            1, query[:, :, rows], key[:, :, rows], value[:, :, rows], 0.3
        )
        for chunk, (which, (start, end)) in zip(chunks, parts, strict=True):
            if not which:
                answer[start:end] = found[0, chunk.first_row : chunk.first_row + chunk.num_tokens]
    if together:
        assert torch.equal(pool[:blocks], pool[blocks:].flip(0))
    return pool[blocks:], answer


@pytest.mark.parametrize(
    ("kind", "width", "dtype"), [("gather", 16, "float32"), ("native", 16, "float32"), ("native", 32, "bfloat16")]
)
@settings(max_examples=20, deadline=None)
@given(
    st.sets(st.integers(1, 29)), st.booleans(), st.sampled_from(ROUNDINGS),
    st.sampled_from([FULL, Rule(window=9), Rule(chunk=11)]),
)  # fmt: skip
def test_a_tokens_bytes_do_not_depend_on_chunks_or_batch(
    kind: str, width: int, dtype: str, cuts: set[int], together: bool, rounding: Rounding, rule: Rule
) -> None:
    group = Group(rule, (0, 1), 2, width, dtype, rounding)
    generator = torch.Generator().manual_seed(len(cuts))
    rows = RoundedRows(group)
    key, value = (torch.randn(1, 2, 30, width, generator=generator).to(rows.dtype) for _ in range(2))
    backend = GatherBackend(rows) if kind == "gather" else NativeBackend(load_library(1), rows)
    whole, right = written(backend, group, [], key, value, False)
    pieces, answer = written(backend, group, sorted(cuts), key, value, together)
    assert torch.equal(whole, pieces)
    assert (answer - right).abs().max() < (1e-5 if kind == "gather" else 1e-30), "native: to the last bit"
