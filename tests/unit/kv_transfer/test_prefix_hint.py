from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.prefix_hint import HintChain, hint_root, prefix_hints

TOKENS = st.lists(st.integers(0, 3), max_size=64)  # few values: near-collisions are likely


@given(TOKENS, st.sampled_from([1, 2, 4, 16]), st.integers(0, 2**64 - 1))
def test_a_chain_that_grows_names_blocks_as_one_look_does(tokens: list[int], size: int, root: int) -> None:
    chain = HintChain(size, root)
    grown: list[int] = []
    while chain.blocks < len(tokens) // size:
        start = chain.blocks * size
        grown += chain.extend(tokens[start : start + size * (1 + chain.blocks)]).tolist()
    assert grown == prefix_hints(np.asarray(tokens, dtype=np.uint32), size, root).tolist()
    assert 0 not in grown


@given(TOKENS, TOKENS, st.sampled_from([1, 4]))
def test_equal_hints_mean_equal_prefixes(a: list[int], b: list[int], size: int) -> None:
    left, right = prefix_hints(a, size, 7).tolist(), prefix_hints(b, size, 7).tolist()
    for i, hint in enumerate(left):
        same = a[: (i + 1) * size] == b[: (i + 1) * size]
        assert (i < len(right) and right[i] == hint) == same
        assert hint not in right[:i] + right[i + 1 :], "of one length, or different"


def test_salt_model_block_size_and_rotary_table_separate_hints() -> None:
    kinds = itertools.product(("m", "n"), (16, 32), ("", "tenant", "long"), (False, True))
    roots = {hint_root(m, b, s, long=long) for m, b, s, long in kinds}
    assert len(roots) == 24
    tokens = list(range(64))
    seen = [set(prefix_hints(tokens, 16, root).tolist()) for root in roots]
    assert len(set.union(*seen)) == sum(map(len, seen))
    assert prefix_hints([0] * 64, 16, 1).tolist() != prefix_hints([0] * 64, 16, 2).tolist()
