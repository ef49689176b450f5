"""Whether torch keeps, on this machine, what batch-invariant mode in torch rests on.

Its libraries choose their code by processor, and promise nothing about bits. So the mode is tried at start, with the
model's own weights and the shape of its attention, and refused where a row's bits depend on its place or neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.attention.choose import AttentionShape, trial_extras
from engine.attention.interface import LATENT, Chunk
from engine.attention.invariant import KEY_TILE, InvariantBackend
from engine.invariant_linear import TILE_ROWS, is_router, tiled_by_heads, tiled_linear
from engine.merged_linear import MERGED

_CONTEXT = KEY_TILE + 18
_CHUNKS = (37, 100, 257)
_DECODED = (1, 74, 299, KEY_TILE - 1, KEY_TILE, _CONTEXT - 1)  # positions


@torch.inference_mode()
def trial_of_invariance(model: Any, shape: AttentionShape) -> str | None:
    """What depends on a row's neighbours; None if nothing was found that does."""
    return (
        _trial_of_linears(model)
        or _trial_of_routers(model)
        or _trial_of_latents(model)
        or _trial_of_attention(shape, next(model.parameters()).device)
    )


def _trial_of_linears(model: Any) -> str | None:
    """One of each shape: in another order, and each of some rows alone."""
    layers = {
        (layer.weight.shape, layer.weight.dtype, layer.bias is None): layer
        for layer in model.modules()
        if isinstance(layer, (nn.Linear, *MERGED))
    }
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        weight, bias = layer.weight, layer.bias
        x = torch.randn(TILE_ROWS, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
        whole = tiled_linear(x, weight, bias)
        same = torch.equal(tiled_linear(x.flip(0), weight, bias).flip(0), whole)
        for row in (0, 1, TILE_ROWS // 2 + 1, TILE_ROWS - 1):
            same = same and torch.equal(tiled_linear(x[row : row + 1], weight, bias), whole[row : row + 1])
        if not same:
            return f"a row of a product with a weight of {list(weight.shape)} depends on its place or neighbours"
    return None


def _trial_of_routers(model: Any) -> str | None:
    """Likewise, of each class and shape one."""
    found = {
        (type(m), m.weight.shape, m.weight.dtype): m for m in model.modules() if is_router(m) and hasattr(m, "weight")
    }
    generator = torch.Generator().manual_seed(0)
    for router in found.values():
        weight = router.weight
        x = torch.randn(TILE_ROWS, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)

        def answers(rows: torch.Tensor, router: Any = router) -> tuple[torch.Tensor, ...]:
            given = router(rows)
            return given if isinstance(given, tuple) else (given,)

        whole = answers(x)
        same = all(torch.equal(a.flip(0), b) for a, b in zip(answers(x.flip(0)), whole, strict=True))
        for row in (0, 1, TILE_ROWS // 2 + 1, TILE_ROWS - 1):
            alone = answers(x[row : row + 1])
            same = same and all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))
        if not same:
            return f"what {type(router).__name__} chooses for a row depends on its place or neighbours"
    return None


def _trial_of_latents(model: Any) -> str | None:
    """Likewise, of what surrounds latent attention, each shape once."""
    found = {(w.shape, w.dtype): w for m in model.modules() if LATENT in m.__dict__ for w in m.__dict__[LATENT].weights}
    generator = torch.Generator().manual_seed(0)
    for weights in found.values():
        heads, size, _ = weights.shape
        x = torch.randn(1, heads, TILE_ROWS, size, generator=generator).to(weights.device, weights.dtype)
        whole = tiled_by_heads(x, weights)
        same = torch.equal(tiled_by_heads(x.flip(2), weights).flip(2), whole)
        for row in (0, 1, TILE_ROWS // 2 + 1, TILE_ROWS - 1):
            one = slice(row, row + 1)
            same = same and torch.equal(tiled_by_heads(x[:, :, one], weights), whole[:, :, one])
        if not same:
            return f"a row of what surrounds latent attention {list(weights.shape)} depends on its place or neighbours"
    return None


def _trial_of_attention(shape: AttentionShape, device: torch.device) -> str | None:
    """One prompt whole; in chunks, each beside a decode of another sequence; its tokens decoded together and alone."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, shape.dtype)

    blocks = -(-_CONTEXT // shape.block_tokens)
    pool = shape.pool(2 * blocks, normal)
    ours, other = list(range(blocks)), list(range(blocks, 2 * blocks))
    q, k, v = (
        normal(1, _CONTEXT + 1, heads, shape.head_dim).transpose(1, 2)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    backend = InvariantBackend(shape.rows)
    extras = trial_extras(shape, normal)

    def attend(chunks: list[Chunk], tokens: list[int]) -> torch.Tensor:
        """`tokens`: which of q, k, v the packed row's rows are; the last is of the other sequence."""
        step = backend.prepare(pool, chunks, shape.rule)
        return step.attend(0, q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], shape.head_dim**-0.5, extras)[0]

    whole = attend([Chunk(0, _CONTEXT, 0, ours)], list(range(_CONTEXT)))
    for size in _CHUNKS:
        for start in range(0, _CONTEXT, size):
            tokens = list(range(start, min(_CONTEXT, start + size)))
            kind = [Chunk(0, 1, 140, other), Chunk(1, len(tokens), start, ours)]
            if not torch.equal(attend(kind, [_CONTEXT, *tokens])[1:], whole[tokens]):
                return f"attention of a prompt's chunk of {len(tokens)} tokens differs from the prompt's as a whole"
    rows: list[int] = list(_DECODED)
    together = attend([Chunk(row, 1, position, ours) for row, position in enumerate(rows)], rows)
    if not torch.equal(together, whole[rows]):
        return "attention of a decoded token differs from the same token's in a prompt"
    for row, position in enumerate(rows):
        if not torch.equal(attend([Chunk(0, 1, position, ours)], [position])[0], together[row]):
            return "attention of a decoded token depends on the batch"
    return None
