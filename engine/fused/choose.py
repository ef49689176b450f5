"""Whether a model runs on fused kernels, decided at start: does it fit, is Triton there, and does a trial agree.

The trial runs prompts and then a decode of each through both, the model as transformers has it and the fused one, with
the engine's own attention backend; it also compiles the kernels before the first request.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.attention.interface import AttentionBackend, Chunk
from engine.forward import TorchForward

_LENGTHS = (70, 1, 33)
# Of the deviation of the reference, for the median row, as in engine/native/stack.py.
_LIMITS = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def fused_model(
    model: Any, backend: AttentionBackend, heads: int, kv_shape: tuple[int, ...], dtype: torch.dtype
) -> Any | str:
    """A model to call in place of `model`, or why there is none. `kv_shape`: of the pool, without blocks."""
    try:
        from engine.fused import model as fused
    except ImportError as error:
        return f"triton does not load ({error})"
    why = fused.obstacle(model, kv_shape[-1])
    if why is not None:
        return why
    try:
        made = fused.FusedModel(model, heads, kv_shape[2])
        return trial(made, model, backend, kv_shape, dtype) or made
    except Exception as error:  # Triton raises its own kinds, and a model's parts may be called in other ways
        return f"its trial failed ({type(error).__name__}: {str(error).strip()[:300]})"


def trial(
    made: Any, model: Any, backend: AttentionBackend, kv_shape: tuple[int, ...], dtype: torch.dtype
) -> str | None:
    """How the fused model's logits, keys and values differ from the model's own; None if they do not."""
    device, block_tokens = next(model.parameters()).device, kv_shape[3]
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    blocks, chunks, decodes, row = 0, [], [], 0
    for i, length in enumerate(_LENGTHS):
        needed = length // block_tokens + 1
        own = list(range(blocks, blocks + needed))
        chunks.append(Chunk(row, length, 0, own))
        decodes.append(Chunk(i, 1, length, own))
        blocks, row = blocks + needed, row + length
    prompts = torch.randint(vocabulary, (row,), generator=generator).tolist()
    positions = [i for length in _LENGTHS for i in range(length)]
    found: list[list[torch.Tensor]] = []
    for tried in (made, model):
        forward = TorchForward(tried, backend)
        pool = torch.zeros((blocks, *kv_shape), dtype=dtype, device=device)
        with torch.inference_mode():
            logits = forward.forward(pool, prompts, positions, chunks, range(row))
            next_ones = forward.forward(pool, [5, 6, 7], list(_LENGTHS), decodes, [0, 1, 2])
        found.append([logits.float(), next_ones.float(), pool.float().flatten(1)])
    for what, ours, theirs in zip(("logits", "logits of decodes", "keys and values"), *found, strict=True):
        off = ((ours - theirs).square().mean(-1).sqrt().median() / theirs.std()).item()
        if not off <= _LIMITS[dtype]:  # a NaN is no agreement
            return f"its {what} differ from transformers' by {off:.2g} of their deviation in a trial"
    return None
