"""Which attention backend an engine runs: decided once, at start.

1. `wanted` names one, or "auto": on a CUDA device the first of triton, flashinfer and flash_attn that serves there,
   else gather. Triton leads because CUDA graphs need it, not by measurement. (On CPU engine/native/choose.py is first.)
2. A candidate is tried at once on a small batch of the model's own shape, against gather: it may compile kernels at run
   time, need a C compiler to do so, and meet a GPU that nobody ran it on. It also spares the first request the wait.
3. If no trial passes, "auto" goes on with gather and a warning; a backend by name is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from engine.attention.gather import GatherBackend
from engine.attention.interface import NO_EXTRAS, PLAIN, AttentionBackend, Chunk, Extras, ExtrasUsed
from engine.kv_rounding import RoundedRows
from kv_transfer.layout import FULL, Group, Rule

log = logging.getLogger(__name__)

_OLDEST_CAPABILITY = (8, 0)
_WIDEST_HEAD_DIM, _WIDEST_LATENT = 256, 640
_TRIAL_TOKENS = 300  # over the border of a split, and of a window or chunk that is no longer than 200
_TRIAL_CAP = 2.0  # of scores about 1
_TRIAL_LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of values about 1


class AttentionChoiceError(Exception):
    """The backend asked for cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a backend will be given: query heads, key heads, elements a head, tokens a block, the pool's type, the rule
    by which tokens look back, what is done to scores besides, and how a rounded group keeps its rows.
    """

    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype
    rule: Rule = FULL
    extras: ExtrasUsed = NO_EXTRAS
    rows: RoundedRows | None = None

    @classmethod
    def of(cls, group: Group, heads: int, block_tokens: int, extras: ExtrasUsed) -> AttentionShape:
        """`heads`: of queries, the most of any layer."""
        whole = max(1, heads // group.kv_heads) * group.kv_heads
        dtype, rows = getattr(torch, group.dtype), RoundedRows(group) if group.rounding else None
        return cls(whole, group.kv_heads, group.width, block_tokens, dtype, group.rule, extras, rows)

    def pool(self, blocks: int, normal: Callable[..., torch.Tensor]) -> torch.Tensor:
        """For a trial: of one layer, filled."""
        shape = (self.kv_heads, self.block_tokens, self.head_dim)
        if self.rows is not None:
            return self.rows.of(normal(blocks, 1, 1, *shape), normal(blocks, 1, 1, *shape))
        return normal(blocks, 1, 1 if self.rule.values else 2, *shape)


Wanted = Literal["auto", "native", "gather", "triton", "flashinfer", "flash_attn"]


def pick_backend(wanted: Wanted, device: torch.device, shape: AttentionShape) -> AttentionBackend:
    """Raises AttentionChoiceError for a backend wanted by name that cannot run."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if wanted == "native":
        raise AttentionChoiceError("engine.attention is native, and the native kernels do not serve here; use auto")
    if wanted == "gather" or (wanted == "auto" and capability is None):
        return GatherBackend(shape.rows)
    reasons: list[str] = []
    for name in LIBRARIES if wanted == "auto" else (wanted,):
        obstacle = obstacle_to(name, capability, shape, installed=find_spec(name) is not None)
        if obstacle is None:
            try:
                backend = load(name)
                obstacle = trial_of_attention(backend, device, shape)
                if obstacle is None:
                    return backend
            except Exception as error:  # each raises its own kinds: compiler missing, too much shared memory, ...
                obstacle = f"it fails on this machine ({type(error).__name__}: {str(error).strip()[:300]})"
        reasons.append(obstacle)
    if wanted != "auto":
        raise AttentionChoiceError(f"engine.attention is {wanted}, and {reasons[0]}; use auto or gather")
    why = "; ".join(f"{name} was not chosen, because {reason}" for name, reason in zip(LIBRARIES, reasons, strict=True))
    log.warning("attention runs on gather, which is slower on a GPU: %s", why)
    return GatherBackend(shape.rows)


LIBRARIES = ("triton", "flashinfer", "flash_attn")  # in the order of auto; also what each is imported as


def obstacle_to(name: str, capability: tuple[int, int] | None, shape: AttentionShape, *, installed: bool) -> str | None:
    """What is known before trying. `capability`: of the CUDA device, None for another device."""
    if capability is None:
        return "the device is not CUDA"
    if shape.rows is not None:
        return f"it does not read KV in {shape.rows.group.rounding}"
    if not installed:
        return f"{name} is not installed"
    if capability < _OLDEST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and {name} needs 8.0"
    widest = _WIDEST_LATENT if shape.rule.values else _WIDEST_HEAD_DIM
    if shape.head_dim > widest:
        return f"the model's head_dim is {shape.head_dim}, above {widest}"
    if name == "triton":
        return None
    if shape.rule.values or shape.rule.chunk:
        return f"it does not serve {shape.rule} attention here"
    if shape.extras.sinks:
        return "it does not serve attention with sinks here"
    if shape.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, not {str(shape.dtype).removeprefix('torch.')}"
    if name == "flash_attn" and shape.block_tokens % 256:
        return f"its pages hold a multiple of 256 tokens, and engine.block_tokens is {shape.block_tokens}"
    if name == "flash_attn" and shape.head_dim % 8:
        return f"the model's head_dim is {shape.head_dim}, not a multiple of 8"
    return None


def load(name: str) -> AttentionBackend:
    """Raises ImportError when the library is absent or broken."""
    if name == "triton":
        from engine.attention.triton_paged import TritonBackend

        return TritonBackend()
    if name == "flashinfer":
        from engine.attention.flashinfer_paged import FlashInferBackend

        return FlashInferBackend()
    from engine.attention.flash_attn_paged import FlashAttnBackend

    return FlashAttnBackend()


def trial_of_attention(backend: AttentionBackend, device: torch.device, shape: AttentionShape) -> str | None:
    """How `backend` differs from gather on a decode, a chunk after a prefix and a prompt; None when it does not.

    Has a small pool of its own, with one layer; what the rule has left is not there. Whatever the backend raises passes
    through.
    """
    blocks = max(2, -(-_TRIAL_TOKENS // shape.block_tokens))
    tokens = blocks * shape.block_tokens
    chunks: list[Chunk] = []
    row = 0
    for new, start in ((1, tokens - 1), (max(1, tokens // 2), tokens - max(1, tokens // 2)), (tokens, 0)):
        first = blocks * len(chunks)
        left = shape.rule.first_block(start, shape.block_tokens)
        table = [-1] * left + list(range(first + blocks - 1 - left, first - 1, -1))
        chunks.append(Chunk(row, new, start, table))
        row += new
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, shape.dtype)

    pool = shape.pool(blocks * len(chunks), normal)
    query, key, value = (
        normal(1, row, heads, shape.head_dim).transpose(1, 2) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    extras = trial_extras(shape, normal)
    pools, answers = [], []
    with torch.inference_mode():
        for tried in (backend, GatherBackend(shape.rows)):
            pools.append(pool.clone())
            step = tried.prepare(pools[-1], chunks, shape.rule)
            answers.append(step.attend(0, query, key, value, shape.head_dim**-0.5, extras).float())
    if not torch.equal(*pools):
        return "it wrote other keys and values than gather in a trial"
    worst = (answers[0] - answers[1]).abs().max().item()
    if not worst <= _TRIAL_LIMITS[shape.dtype]:  # a NaN is no agreement
        return f"it differs from gather by {worst:.3g} in a trial"
    return None


def trial_extras(shape: AttentionShape, normal: Callable[[int], torch.Tensor]) -> Extras:
    """What the model does to its scores, with numbers of our own."""
    if not shape.extras:
        return PLAIN
    return Extras(_TRIAL_CAP if shape.extras.softcap else 0.0, normal(shape.heads) if shape.extras.sinks else None)
