"""Norm with residual, rotary embedding with the write into the pool, gated SiLU: one launch each.

Checked through Triton's interpreter and compiled for compute capabilities 8.0 and 9.0; not yet run on a GPU. Arithmetic
is float32; what transformers rounds to the model's type between its own operators is rounded here too, but for the
terms of a rotation. Import this file only where it is used (engine/fused/choose.py): Triton may be absent.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# Kernels. The last dimension of every tensor is contiguous; strides are in elements.


@triton.jit
def _add_norm(out, stream, delta, weight, epsilon, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, ADD: tl.constexpr):
    """Grid [T]. stream [T, SIZE] += delta (with ADD, in place); out = stream / rms(stream) * weight."""
    row = tl.program_id(0).to(tl.int64) * SIZE
    at = tl.arange(0, SIZE_PADDED)
    inside = at < SIZE
    x = tl.load(stream + row + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta + row + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(stream.dtype.element_ty)
        tl.store(stream + row + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    normed = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / SIZE + epsilon))
    normed = normed.to(out.dtype.element_ty).to(tl.float32)
    normed *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layer"])
def _rotate(
    query, key, pool, qkv, cos, sin, query_weight, key_weight, epsilon, blocks, slots, layer,
    pool_block, pool_layer, pool_half, pool_head, pool_slot,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    NORM: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Grid [T, HEADS + KV_HEADS], or [T, HEADS + 2 KV_HEADS] with WRITE. One program is one head of one token.

    qkv [T, HEADS + 2 KV_HEADS, 2 HALF]; cos, sin [T, 2 HALF]. Rotated queries go to query [T, HEADS, 2 HALF]; keys to
    key [T, KV_HEADS, 2 HALF], or with WRITE, like values, into the pool as by write_kernel of
    engine/attention/triton_kernels.py.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, HALF_PADDED)
    inside = at < HALF
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + at
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORM:
            inverse = 1.0 / tl.sqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / (2 * HALF) + epsilon)
            weight = query_weight
            if head >= HEADS:
                weight = key_weight
            low = (low * inverse).to(qkv.dtype.element_ty).to(tl.float32)
            high = (high * inverse).to(qkv.dtype.element_ty).to(tl.float32)
            low = low * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
            high = high * tl.load(weight + HALF + at, mask=inside, other=0.0).to(tl.float32)
            low = low.to(qkv.dtype.element_ty).to(tl.float32)
            high = high.to(qkv.dtype.element_ty).to(tl.float32)
        angle = row * (2 * HALF) + at
        rotated = low * tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        rotated -= high * tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        high = high * tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
        high += low * tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
        low = rotated
    if head < HEADS:
        target = query + (row * HEADS + head) * (2 * HALF) + at
        tl.store(target, low.to(query.dtype.element_ty), mask=inside)
        tl.store(target + HALF, high.to(query.dtype.element_ty), mask=inside)
    else:
        if WRITE:
            block = tl.load(blocks + row).to(tl.int64)
            slot = tl.load(slots + row).to(tl.int64)
            kv = (head - HEADS) // KV_HEADS
            target = pool + block * pool_block + layer * pool_layer + kv * pool_half + slot * pool_slot + at
            target += ((head - HEADS) % KV_HEADS) * pool_head
            inside = inside & (block >= 0)
            tl.store(target, low.to(pool.dtype.element_ty), mask=inside)
            tl.store(target + HALF, high.to(pool.dtype.element_ty), mask=inside)
        else:
            target = key + (row * KV_HEADS + head - HEADS) * (2 * HALF) + at
            tl.store(target, low.to(key.dtype.element_ty), mask=inside)
            tl.store(target + HALF, high.to(key.dtype.element_ty), mask=inside)


@triton.jit
def _gate(out, gate_up, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Grid [T, SIZE / TILE]. gate_up [T, 2 SIZE] -> out [T, SIZE] = silu(first half) * second half."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < SIZE
    source = gate_up + row * (2 * SIZE) + at
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + SIZE, mask=inside, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * SIZE + at, (gate * up).to(out.dtype.element_ty), mask=inside)


# Calls.


def add_norm(stream: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """stream [T, size] takes delta up, in place; returns its RMS norm (Zhang and Sennrich 2019) times `weight`."""
    rows, size = stream.shape
    out = torch.empty_like(stream)
    padded = _power(size)
    _launch(
        _add_norm, (rows,), out, stream, stream if delta is None else delta, weight, epsilon,
        SIZE=size, SIZE_PADDED=padded, ADD=delta is not None, num_warps=min(16, max(1, padded // 256)),
    )  # fmt: skip
    return out


def rotate(
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int,
    angles: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    epsilon: float,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """qkv [T, (heads + 2 kv_heads) * dim], angles cos and sin [T, dim] -> query [T, heads, dim], and key likewise.

    `norms`: weights [dim] of per-head norms before the rotation. `into`: pool, block and slot of each token, and the
    layer; keys and values are written there, and no key is returned.
    """
    rows, dim = len(qkv), qkv.shape[1] // (heads + 2 * kv_heads)
    query = torch.empty((rows, heads, dim), dtype=qkv.dtype, device=qkv.device)
    key = None if into is not None else torch.empty((rows, kv_heads, dim), dtype=qkv.dtype, device=qkv.device)
    pool, blocks, slots, layer = into or (qkv, qkv, qkv, 0)
    strides = pool.stride()[:5] if into is not None else (0,) * 5
    weights = norms or (qkv, qkv)
    _launch(
        _rotate, (rows, heads + (2 if into is not None else 1) * kv_heads),
        query, query if key is None else key, pool, qkv, *angles, *weights, epsilon, blocks, slots, layer, *strides,
        HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, HALF_PADDED=_power(dim // 2), NORM=norms is not None,
        WRITE=into is not None, num_warps=1,
    )  # fmt: skip
    return query, key


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 size] -> [T, size]: silu of the first half, times the second."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    tile = min(1024, _power(size))
    _launch(_gate, (rows, -(-size // tile)), out, gate_up, SIZE=size, TILE=tile, num_warps=4)
    return out


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Triton launches on the current device, and types a kernel's parameters as its body sees them."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)
