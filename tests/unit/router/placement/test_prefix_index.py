"""The index agrees with a plain model, whatever is reported in whatever order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router.placement.prefix_index import PrefixIndex

# A small tree of prompts: block -> the block before it.
PARENTS = {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 2, 7: 6, 8: 0, 9: 8, 10: 3}
CHAINS = [[1, 2, 3, 4, 5], [1, 2, 6, 7], [8, 9], [1, 2, 3, 10]]
WORKERS = ("a", "b", "c", "d")


class Model:
    """Sets of blocks; a prefix ends at the first that is missing."""

    def __init__(self) -> None:
        self.held: dict[str, set[int]] = {}

    def depth(self, worker: str, chain: list[int]) -> int:
        held = self.held.get(worker, set())
        return next((i for i, block in enumerate(chain) if block not in held), len(chain))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["stored", "stored", "stored", "run", "removed", "removed", "cleared", "gone"]),
        st.sampled_from(WORKERS),
        st.lists(st.sampled_from(sorted(PARENTS)), min_size=1, max_size=5),
        st.sampled_from(CHAINS),
        st.integers(0, 4),
    ),
    max_size=60,
)


@given(STEPS)
def test_the_index_agrees_with_a_plain_model(steps: list) -> None:
    index: PrefixIndex[str] = PrefixIndex()
    model = Model()
    for kind, worker, blocks, chain, start in steps:
        match kind:
            case "stored":
                for block in blocks:
                    index.stored(worker, [block], PARENTS[block])
                model.held.setdefault(worker, set()).update(blocks)
            case "run":
                run = chain[start:]
                index.stored(worker, run, PARENTS[run[0]] if run else 0)
                model.held.setdefault(worker, set()).update(run)
            case "removed":
                index.removed(worker, blocks)
                model.held.get(worker, set()).difference_update(blocks)
            case "cleared":
                index.cleared(worker)
                model.held.pop(worker, None)
            case _:
                index.gone(worker)
                model.held.pop(worker, None)
        index.check()
        for one in CHAINS:
            hits = index.match(np.asarray(one, dtype=np.uint64), block_tokens=16)
            expected = {w: 16 * d for w in WORKERS if (d := model.depth(w, one))}
            assert dict(hits) == expected
            assert len(hits) == len(expected)
            assert all(hits.get(w) == expected.get(w, 0) for w in WORKERS)
            assert [t for _, t in hits.top(3)] == sorted(expected.values(), reverse=True)[:3]
    for worker in WORKERS:
        index.gone(worker)
    assert len(index) == 0, "nothing is kept of workers that are gone"


def test_nothing_is_known_of_a_foreign_or_empty_prompt() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    index.stored("a", [1, 2, 3])
    assert dict(index.match([])) == {}
    assert dict(index.match([4, 2, 3])) == {}
    assert index.matched_blocks([1, 2, 9]) == {"a": 2}


def test_an_evicted_middle_block_hides_what_follows_until_it_is_back() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    index.stored("a", [1, 2, 3, 4])
    index.removed("a", [2])
    assert index.matched_blocks([1, 2, 3, 4]) == {"a": 1}
    index.stored("a", [2], 1)
    assert index.matched_blocks([1, 2, 3, 4]) == {"a": 4}


def test_places_of_workers_that_are_gone_are_used_again() -> None:
    index: PrefixIndex[int] = PrefixIndex()
    for worker in range(100):
        index.stored(worker, [7])
        index.gone(worker)
    index.stored(100, [7])
    assert index._bits == {100: 1}
