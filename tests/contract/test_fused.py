"""Fused kernels against plain torch, and models that run on them against transformers' own forward.

Through Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from engine.attention.gather import GatherBackend
from engine.attention.interface import AttentionBackend, register
from engine.forward import TorchForward
from engine.fused.choose import fused_model
from engine.kv_shape import KvShape
from engine.model_loader import load_model
from engine.runner import _keep_compiled_kernels
from tests.model.test_families import LLAMA3_ROPE, saved
from tests.support.tiers import tiered
from tests.support.triton_interpreter import ON_GPU

from engine.attention.triton_paged import Sizes, TritonBackend  # isort: skip  (after the interpreter)
from engine.fused import kernels  # isort: skip

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative; the interpreter cuts bfloat16 off, a GPU rounds
DTYPES = pytest.mark.parametrize("dtype", LIMITS)


def normal(*size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert found.dtype == expected.dtype
    return torch.allclose(found, expected, rtol=LIMITS[found.dtype], atol=LIMITS[found.dtype])


def plain_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


@pytest.mark.skipif(ON_GPU, reason="kernels are compiled here")
def test_another_library_may_have_imported_triton_before() -> None:
    """Tests run in any order, and what they import is there for those that follow."""
    program = (
        "import tests.conftest, triton.language, torch, tests.support.triton_interpreter\n"
        "from engine.fused import kernels\n"
        "x = torch.ones(2, 64)\n"
        "assert torch.equal(kernels.add_norm(x, None, torch.ones(64), 0.0), x)\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{root}:{root / 'proto'}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, timeout=90,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@DTYPES
@pytest.mark.parametrize("size", [64, 100])
def test_norm_takes_the_residual_up(dtype: torch.dtype, size: int) -> None:
    stream, delta = normal(3, size, dtype=dtype), normal(3, size, dtype=dtype, seed=1)
    weight = normal(size, dtype=dtype, seed=2)
    given = stream.clone()
    assert near(kernels.add_norm(given, None, weight, 1e-5), plain_norm(stream, weight, 1e-5))
    assert torch.equal(given, stream), "without a delta the stream stays"
    assert near(kernels.add_norm(given, delta, weight, 1e-5), plain_norm(stream + delta, weight, 1e-5))
    assert near(given, stream + delta)


@DTYPES
@pytest.mark.parametrize("size", [96, 1500])
def test_gate(dtype: torch.dtype, size: int) -> None:
    both = normal(3, 2 * size, dtype=dtype)
    assert near(kernels.gate(both), silu(both[:, :size]) * both[:, size:])


@DTYPES
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (3, 1, 24)])
def test_rotation_and_write(dtype: torch.dtype, normed: bool, heads: int, kv_heads: int, dim: int) -> None:
    rows, block = 5, 4
    qkv = normal(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angle = normal(rows, dim // 2, dtype=torch.float32, seed=1).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    weights = (normal(dim, dtype=dtype, seed=2), normal(dim, dtype=dtype, seed=3)) if normed else None
    by_head = qkv.view(rows, -1, dim)
    query, key, value = by_head.split([heads, kv_heads, kv_heads], dim=1)
    if weights is not None:
        query, key = plain_norm(query, weights[0], 1e-6), plain_norm(key, weights[1], 1e-6)

    def turned(x: torch.Tensor) -> torch.Tensor:
        half = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), dim=-1)
        return x * cos[:, None] + half * sin[:, None]

    found_query, found_key = kernels.rotate(qkv, heads, kv_heads, (cos, sin), weights, 1e-6, None)
    assert found_key is not None
    assert near(found_query, turned(query))
    assert near(found_key, turned(key))

    pool = normal(6, 3, 2, kv_heads, block, dim, dtype=dtype, seed=4)
    expected = pool.clone()
    blocks = torch.tensor([5, 0, -1, 2, 2], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([1, 3, 0, 0, 2], dtype=torch.int32, device=DEVICE)
    for i, (b, s) in enumerate(zip(blocks.tolist(), slots.tolist(), strict=True)):
        if b >= 0:  # -1 is padding, and goes nowhere
            expected[b, 1, 0, :, s], expected[b, 1, 1, :, s] = found_key[i], value[i]
    found, nothing = kernels.rotate(qkv, heads, kv_heads, (cos, sin), weights, 1e-6, (pool, blocks, slots, 1))
    assert nothing is None
    assert torch.equal(found, found_query)
    assert torch.equal(pool, expected)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def made_of(tmp_path: Path, family: str, changes: dict[str, Any], backend: AttentionBackend) -> Any | str:
    """After its trial."""
    register()
    path = saved(tmp_path, family, **(SMALL | changes))
    model, facts, trial = load_model(str(path), "float32", DEVICE, None)
    return fused_model(model, backend, facts.heads, KvShape(facts.groups, 8), trial.reference)


@pytest.mark.parametrize(
    ("family", "changes"),
    tiered(
        [("Llama", {"num_hidden_layers": 2}), ("Qwen3", {"head_dim": 32})],
        [
            (
                "Llama",
                {"attention_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True},
            ),
            ("Mistral", {"sliding_window": None}),
            ("Qwen2", {}),
            ("Qwen3Moe", MOE),
        ],
    ),
)
def test_models_of_the_common_shape_agree(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """Prompts and decodes; gather writes keys and values itself."""
    made = made_of(tmp_path, family, changes, GatherBackend())
    assert not isinstance(made, str), made


@pytest.mark.parametrize(
    "backend", [GatherBackend(), TritonBackend(Sizes(rows=16, few_rows=16, keys=16, split_tokens=32))]
)
def test_keys_are_written_by_whoever_rotates(tmp_path: Path, backend: AttentionBackend) -> None:
    made = made_of(tmp_path, "Llama", {}, backend)
    assert not isinstance(made, str), made
    assert TorchForward(made, backend, layers="fused layers").name == f"{backend.name}, fused layers"


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("Gemma", {"head_dim": 16}, "differs from transformers'"),  # its norms multiply by 1 + weight
        ("Granite", {"residual_multiplier": 0.5}, "differs from transformers'"),
        ("Olmo2", {}, "layers are of another kind"),
        ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 256}, "not built as model.model.layers"),
    ],
)
def test_other_models_keep_their_own_layers(tmp_path: Path, family: str, changes: dict[str, Any], words: str) -> None:
    why = made_of(tmp_path, family, changes, GatherBackend())
    assert isinstance(why, str)
    assert words in why


def test_compiled_kernels_are_kept_where_everything_else_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # so that it is taken away again
    del os.environ["TRITON_CACHE_DIR"]
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", "/elsewhere")
    _keep_compiled_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert os.environ["FLASHINFER_WORKSPACE_BASE"] == "/elsewhere", "told otherwise"
