"""The cheap end of `make soak`: 100 seeds (300 in `make test-long`), and proof that planted bugs are found."""

from __future__ import annotations

from unittest import mock

import pytest

from tests.scenarios.mutants import MUTANTS, Mutant, seeds_to_find
from tests.scenarios.nodes import SimWorker
from tests.scenarios.scenario import run
from tests.support.tiers import tiered

CHUNK = 50

# Seeds that failed once, and what was wrong then.
REGRESSIONS = {
    31: "the first token was the last, its handoff failed for want of leases, and decode sampled one more",
    60016: "a moving answer was frozen while it computed its tokens again, and leases had no room for all of them",
    62155: "one of two decode workers was killed while the other one drained: a new request is refused, and says why",
    64012: "after a wait for room, our own doing counted as an attempt, and the answer was given up",
    50428: "a moving answer, frozen, was asked to freeze again, found no room for leases and let its reader go",
    822: "what crashes workers was cancelled on one a moment before: that crash was nobody's, and a third one had it",
}


@pytest.mark.parametrize("chunk", tiered(range(2), range(2, 6)))
def test_seeds_are_clean(chunk: int) -> None:
    outcomes = [run(seed) for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
    assert sum(o.recoveries for o in outcomes) > 0, "faults that hit nothing prove nothing"
    assert sum(o.beside for o in outcomes) > 0, "no further answer began beside the first"
    assert sum(o.resumed for o in outcomes) > 0, "routers died, and no client went on elsewhere"


@pytest.mark.parametrize("chunk", tiered(range(1), range(1, 6)))
def test_seeds_are_clean_where_some_workers_speculate(chunk: int) -> None:
    """Behind prefill workers that do not, and the other way round: answers that are handed over, moved, resumed."""
    with mock.patch.object(SimWorker, "speculates", True):
        for seed in range(chunk * CHUNK // 2, (chunk + 1) * CHUNK // 2):
            run(seed)


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_seeds_that_failed_once(seed: int) -> None:
    run(seed)


def test_a_seed_replays_exactly() -> None:
    stories: list[list[str]] = []
    for _ in range(2):
        lines: list[str] = []
        run(17, trace=lines.append)
        stories.append(lines)
    assert stories[0] == stories[1]
    assert len(stories[0]) > 5


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.within <= 100], ids=lambda m: m.name)
def test_a_planted_bug_is_found(mutant: Mutant) -> None:
    assert seeds_to_find(mutant) is not None
