"""Paged attention in Triton kernels: what a GPU runs. Strides are in elements; the last dimension of every tensor is
contiguous. What launches them, and why there are three: engine/attention/triton_paged.py.

Softmax is online: a running maximum and sum, rescaled as keys come (Milakov and Gimelshein 2018, arXiv:1805.02867;
tiled with the product by V: FlashAttention, arXiv:2205.14135), in powers of two: exp(x) = 2^(x log2 e). Splits i with
answers o_i and z_i = log2 sum_j 2^(s_ij) join as sum_i 2^(z_i) o_i / sum_i 2^(z_i) (Flash-Decoding, Dao et al. 2023).
Scores, softmax and sums are float32; a product's operands are of the pool's type. A sink is where the running maximum
and sum begin.

In a latent pool the first DIM elements of a key are its value, and REST more belong to the key alone; elsewhere REST is
0. Powers of two hold 512 + 64 as two pieces, not as one of 1024.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
TILE_FIELDS = tl.constexpr(7)  # first row, new tokens, start, its blocks' place, first pair, partial place, splits


@triton.jit(do_not_specialize=["layer"])
def write_kernel(
    pool, key, value, blocks, slots, layer,
    pool_block, pool_layer, pool_half, pool_head, pool_slot, key_head, key_row, value_head, value_row,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """Grid [T]. key, value [kv_heads, T, DIM] -> slot slots[row] of block blocks[row] of the pool's layer. LATENT: keys
    only.

    A row of block -1 is padding and goes nowhere.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.load(blocks + row).to(tl.int64)
    slot = tl.load(slots + row)
    head = tl.arange(0, HEADS_PADDED)[:, None]
    dim = tl.arange(0, DIM_PADDED)[None, :]
    inside = (head < HEADS) & (dim < DIM) & (block >= 0)
    target = pool + block * pool_block + layer * pool_layer + head * pool_head + slot * pool_slot + dim
    k = tl.load(key + head * key_head + row * key_row + dim, mask=inside)
    tl.store(target, k.to(pool.dtype.element_ty), mask=inside)
    if not LATENT:
        v = tl.load(value + head * value_head + row * value_row + dim, mask=inside)
        tl.store(target + pool_half, v.to(pool.dtype.element_ty), mask=inside)


@triton.jit
def _looks_from(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first key that a token at `position` looks at."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position - (WINDOW - 1), 0)
    if CHUNK > 0:
        first = position // CHUNK * CHUNK
    return first


@triton.jit
def _fold(
    answer, top, total, q, q_rest, keys, values, table, at, first, end, position, scale, cap, pool_block, pool_slot,
    BLOCK_TOKENS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    REST: tl.constexpr, REST_PADDED: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Folds keys [at, at + KEYS) into the running answer [ROWS, DIM_PADDED], maximum and sum [ROWS].

    MASKED: the tile reaches beyond first .. end (keys outside are not read) or keys that not every row may see.
    """
    key = at + tl.arange(0, KEYS)
    dim = tl.arange(0, DIM_PADDED)[None, :]
    inside = dim < DIM
    if MASKED:
        there = (key >= first) & (key < end)
        block = tl.load(table + key // BLOCK_TOKENS, mask=there, other=0).to(tl.int64)
        inside = inside & there[:, None]
    else:
        block = tl.load(table + key // BLOCK_TOKENS).to(tl.int64)
    row = (block * pool_block + (key % BLOCK_TOKENS) * pool_slot)[:, None]
    if MASKED or DIM != DIM_PADDED:
        k = tl.load(keys + row + dim, mask=inside, other=0.0)
    else:
        k = tl.load(keys + row + dim)
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if REST > 0:
        rest = tl.arange(0, REST_PADDED)[None, :]
        inside_rest = rest < REST
        if MASKED:
            inside_rest = inside_rest & there[:, None]
        k_rest = tl.load(keys + row + DIM + rest, mask=inside_rest, other=0.0)
        score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision="ieee")
    score = score * scale
    if CAPPED:  # tanh(x) = 1 - 2 / (e^2x + 1); `scale` has made it a power of two
        score = (1.0 - 2.0 / (tl.exp2(score) + 1.0)) * cap
    if MASKED:
        sees = key[None, :] <= position[:, None]
        if WINDOW > 0 or CHUNK > 0:
            sees = sees & (key[None, :] >= _looks_from(position, WINDOW, CHUNK)[:, None])
        score = tl.where(sees, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    # A row that has seen no key yet: -inf minus -inf is NaN, so it is measured from zero.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - base)
    weight = tl.exp2(score - base[:, None])
    total = total * shrink + tl.sum(weight, 1)
    if REST > 0:
        v = k
    elif MASKED or DIM != DIM_PADDED:
        v = tl.load(values + row + dim, mask=inside, other=0.0)
    else:
        v = tl.load(values + row + dim)
    answer = tl.dot(weight.to(v.dtype), v, answer * shrink[:, None], input_precision="ieee")
    return answer, new_top, total


@triton.jit(do_not_specialize=["layer"])
def attend_kernel(
    output, partial, partial_log2, query, pool, tiles, items, block_ids, sinks, layer, scale, cap,
    query_head, query_row, pool_block, pool_layer, pool_half, pool_head, pool_slot,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    REST: tl.constexpr, REST_PADDED: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid [tiles, kv_heads], or [items, kv_heads] with SPLIT_TOKENS > 0.

    query [heads, T, DIM + REST], sinks [heads]. Without splits a tile sees its whole context and goes to output [T,
    heads, DIM]. With splits an item (tile, first key) sees SPLIT_TOKENS keys of it and goes to partial [pairs,
    kv_heads, DIM] and partial_log2 [pairs, kv_heads], both float32: a tile's live pairs once for each of its splits,
    from its place on; sinks wait for reduce_kernel.
    """
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    tile = item
    begin = 0
    if SPLIT_TOKENS > 0:
        tile = tl.load(items + 2 * item)
        begin = tl.load(items + 2 * item + 1)
    tiles += tile * TILE_FIELDS
    first_row = tl.load(tiles).to(tl.int64)
    num_tokens = tl.load(tiles + 1)
    start = tl.load(tiles + 2)
    table = block_ids + tl.load(tiles + 3)
    first_pair = tl.load(tiles + 4)

    pair = first_pair + tl.arange(0, ROWS)
    token = pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    position = start + token
    dim = tl.arange(0, DIM_PADDED)[None, :]
    inside = (token < num_tokens)[:, None] & (dim < DIM)
    row = first_row + token
    at_row = query + (head * query_head)[:, None] + (row * query_row)[:, None]
    q = tl.load(at_row + dim, mask=inside, other=0.0).to(pool.dtype.element_ty)
    q_rest = q
    if REST > 0:
        rest = tl.arange(0, REST_PADDED)[None, :]
        inside_rest = (token < num_tokens)[:, None] & (rest < REST)
        q_rest = tl.load(at_row + DIM + rest, mask=inside_rest, other=0.0).to(pool.dtype.element_ty)

    # Keys that some row sees, and keys that every row sees.
    first = _looks_from(start + first_pair // GROUP, WINDOW, CHUNK)
    end = start + tl.minimum((first_pair + ROWS - 1) // GROUP + 1, num_tokens)
    seen_by_all = start + first_pair // GROUP + 1
    low = begin
    if SPLIT_TOKENS > 0:
        end = tl.minimum(end, begin + SPLIT_TOKENS)
        seen_by_all = tl.minimum(seen_by_all, end)
    whole = begin + tl.maximum(seen_by_all - begin, 0) // KEYS * KEYS
    if WINDOW > 0 or CHUNK > 0:
        low = tl.maximum(begin, first // KEYS * KEYS)
        whole = low

    keys = pool + layer.to(tl.int64) * pool_layer + kv_head * pool_head
    values = keys + pool_half
    answer = tl.zeros([ROWS, DIM_PADDED], dtype=tl.float32)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if SINKS and SPLIT_TOKENS == 0:
        top = tl.load(sinks + head, mask=token < num_tokens, other=0.0).to(tl.float32) * LOG2_E
        total += 1.0
    for at in range(low, whole, KEYS):
        answer, top, total = _fold(
            answer, top, total, q, q_rest, keys, values, table, at, first, end, position, scale, cap, pool_block,
            pool_slot, BLOCK_TOKENS, KEYS, DIM, DIM_PADDED, REST, REST_PADDED, WINDOW, CHUNK, CAPPED, False,
        )  # fmt: skip
    for at in range(whole, end, KEYS):
        answer, top, total = _fold(
            answer, top, total, q, q_rest, keys, values, table, at, first, end, position, scale, cap, pool_block,
            pool_slot, BLOCK_TOKENS, KEYS, DIM, DIM_PADDED, REST, REST_PADDED, WINDOW, CHUNK, CAPPED, True,
        )  # fmt: skip

    # A split where a row sees no key leaves that row nothing: answer 0, log2 of sum -inf.
    divisor = tl.where(total == 0.0, 1.0, total)
    answer = answer / divisor[:, None]
    if SPLIT_TOKENS > 0:
        live = tl.minimum(num_tokens * GROUP - first_pair, ROWS)
        split = begin // SPLIT_TOKENS - _looks_from(start, WINDOW, CHUNK) // SPLIT_TOKENS
        place = tl.load(tiles + 5).to(tl.int64) + split * live + tl.arange(0, ROWS)
        place = place * KV_HEADS + kv_head
        tl.store(partial_log2 + place, top + tl.log2(divisor), mask=token < num_tokens)
        tl.store(partial + place[:, None] * DIM + dim, answer, mask=inside)
    else:
        target = output + (row * (KV_HEADS * GROUP) + head)[:, None] * DIM + dim
        tl.store(target, answer.to(output.dtype.element_ty), mask=inside)


@triton.jit
def reduce_kernel(
    output, partial, partial_log2, tiles, sinks,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, SINKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Grid [tiles, kv_heads]. Joins a tile's splits, first to last -> output [T, heads, DIM]."""
    kv_head = tl.program_id(1)
    tiles += tl.program_id(0) * TILE_FIELDS
    first_row = tl.load(tiles).to(tl.int64)
    num_tokens = tl.load(tiles + 1)
    first_pair = tl.load(tiles + 4)
    pair = first_pair + tl.arange(0, ROWS)
    first_place = tl.load(tiles + 5).to(tl.int64)
    num_splits = tl.load(tiles + 6)
    live = tl.minimum(num_tokens * GROUP - first_pair, ROWS)
    token = pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    dim = tl.arange(0, DIM_PADDED)[None, :]
    inside = (token < num_tokens)[:, None] & (dim < DIM)

    answer = tl.zeros([ROWS, DIM_PADDED], dtype=tl.float32)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if SINKS:
        top = tl.load(sinks + head, mask=token < num_tokens, other=0.0).to(tl.float32) * LOG2_E
        total += 1.0
    for split in range(num_splits):
        place = (first_place + split * live + tl.arange(0, ROWS)) * KV_HEADS + kv_head
        log2_sum = tl.load(partial_log2 + place, mask=token < num_tokens, other=0.0)
        part = tl.load(partial + place[:, None] * DIM + dim, mask=inside, other=0.0)
        new_top = tl.maximum(top, log2_sum)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # as in _fold
        shrink = tl.exp2(top - base)
        weight = tl.exp2(log2_sum - base)
        answer = answer * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        top = new_top
    target = output + ((first_row + token) * (KV_HEADS * GROUP) + head)[:, None] * DIM + dim
    divisor = tl.where(total == 0.0, 1.0, total)  # rows of padding
    tl.store(target, (answer / divisor[:, None]).to(output.dtype.element_ty), mask=inside)
