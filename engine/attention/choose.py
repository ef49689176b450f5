"""Which attention backend an engine runs: decided once, at start.

1. `wanted` names one, or "auto": triton on a CUDA device that it supports, where it can be imported; gather otherwise.
   (On CPU engine/native/choose.py comes first.)
2. Triton is tried at once on a small batch of the model's own shape, against gather: it compiles kernels at run time,
   needs a C compiler to do so, and may meet a GPU that nobody ran it on. It also spares the first request the wait.
3. If the trial fails, "auto" goes on with gather and a warning; "triton" by name is refused.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from engine.attention.gather import GatherBackend
from engine.attention.interface import AttentionBackend, Chunk

log = logging.getLogger(__name__)

_OLDEST_CAPABILITY = (8, 0)
_WIDEST_HEAD_DIM = 256
_TRIAL_TOKENS = 300  # over the border of a split
_TRIAL_LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of values about 1


class AttentionChoiceError(Exception):
    """The backend asked for cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a backend will be given: query heads, key heads, elements a head, tokens a block, the pool's type."""

    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype


def pick_backend(
    wanted: Literal["auto", "native", "gather", "triton"], device: torch.device, shape: AttentionShape
) -> AttentionBackend:
    """Raises AttentionChoiceError for a backend wanted by name that cannot run."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    obstacle = obstacle_to_triton(capability, shape.head_dim, installed=find_spec("triton") is not None)
    if wanted == "native":
        raise AttentionChoiceError("engine.attention is native, and the native kernels do not serve here; use auto")
    if wanted == "gather" or (wanted == "auto" and capability is None):
        return GatherBackend()
    if obstacle is None:
        try:
            backend = load_triton()
            obstacle = trial_of_attention(backend, device, shape)
            if obstacle is None:
                return backend
        except Exception as error:  # Triton raises its own kinds: compiler missing, too much shared memory, ...
            obstacle = f"it fails on this machine ({type(error).__name__}: {str(error).strip()[:300]})"
    if wanted == "triton":
        raise AttentionChoiceError(f"engine.attention is triton, and {obstacle}; use auto or gather")
    log.warning("attention runs on gather, which is slower on a GPU: triton was not chosen, because %s", obstacle)
    return GatherBackend()


def obstacle_to_triton(capability: tuple[int, int] | None, head_dim: int, installed: bool) -> str | None:
    """What is known before trying. `capability`: of the CUDA device, None for another device."""
    if capability is None:
        return "the device is not CUDA"
    if not installed:
        return "triton is not installed"
    if capability < _OLDEST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and Triton needs 8.0"
    if head_dim > _WIDEST_HEAD_DIM:
        return f"the model's head_dim is {head_dim}, above {_WIDEST_HEAD_DIM}"
    return None


def load_triton() -> AttentionBackend:
    """Raises ImportError when triton is absent or broken."""
    from engine.attention.triton_paged import TritonBackend

    return TritonBackend()


def trial_of_attention(backend: AttentionBackend, device: torch.device, shape: AttentionShape) -> str | None:
    """How `backend` differs from gather on a decode, a chunk after a prefix and a prompt; None when it does not.

    Has a small pool of its own, with one layer. Whatever the backend raises passes through.
    """
    blocks = max(2, -(-_TRIAL_TOKENS // shape.block_tokens))
    tokens = blocks * shape.block_tokens
    chunks: list[Chunk] = []
    row = 0
    for new, start in ((1, tokens - 1), (max(1, tokens // 2), tokens - max(1, tokens // 2)), (tokens, 0)):
        first = blocks * len(chunks)
        chunks.append(Chunk(row, new, start, list(range(first + blocks - 1, first - 1, -1))))
        row += new
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, shape.dtype)

    pool = normal(blocks * len(chunks), 1, 2, shape.kv_heads, shape.block_tokens, shape.head_dim)
    query, key, value = (
        normal(1, row, heads, shape.head_dim).transpose(1, 2) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    pools, answers = [], []
    with torch.inference_mode():
        for tried in (backend, GatherBackend()):
            pools.append(pool.clone())
            step = tried.prepare(pools[-1], chunks)
            answers.append(step.attend(0, query, key, value, shape.head_dim**-0.5).float())
    if not torch.equal(*pools):
        return "it wrote other keys and values than gather in a trial"
    worst = (answers[0] - answers[1]).abs().max().item()
    if not worst <= _TRIAL_LIMITS[shape.dtype]:  # a NaN is no agreement
        return f"it differs from gather by {worst:.3g} in a trial"
    return None
