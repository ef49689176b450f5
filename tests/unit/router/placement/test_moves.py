"""Balance in the large: where nothing comes and nothing ends, moves from slow workers to quick ones come to an end."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from router.placement.moves import BEHIND, Candidate, Offers, Reason, Source, behind, choose
from router.placement.view import WorkerKey, WorkerView

KEYS = [WorkerKey(f"d{i}", 1) for i in range(4)]
HERE_MS = 20.0


def step_ms(sequences: int) -> float:
    return HERE_MS * (1.0 + sequences / 4)


def view(key: WorkerKey, sequences: int) -> WorkerView:
    measured = step_ms(sequences)
    return WorkerView(
        key, 4000, 4000 - 40 * sequences, 16, 32_768, 0, sequences, measured, 0.0, 1e9, "kv", 0, 0.0, 0, measured
    )


@pytest.mark.parametrize("seed", range(20))
def test_loads_become_alike_and_no_answer_moves_twice(seed: int) -> None:
    rng = random.Random(seed)
    on = {key: [f"{key.worker_id}/{i}" for i in range(rng.choice((0, 2, 5, 20)))] for key in KEYS}
    came_from: dict[str, WorkerKey] = {}
    moved: Counter[str] = Counter()
    for _ in range(100):
        views = [view(key, len(on[key])) for key in KEYS]
        sources = []
        for key in behind(views):
            candidates = [
                Candidate(name, 500, 1500, not_to=frozenset({came_from[name]} if name in came_from else ()))
                for name in on[key]
            ]
            source = Source(
                key, "kv", Reason.BALANCE, step_ms(len(on[key])), 0, False, candidates, running=len(candidates)
            )
            sources.append(source)
        moves = choose(sources, Offers(views, ()))
        assert len({move.target for move in moves}) == len(moves), "one comes to a worker at a time"
        for move in moves:
            source = next(key for key in KEYS if move.key in on[key])
            on[source].remove(move.key)
            on[move.target].append(move.key)
            came_from[move.key] = source
            moved[move.key] += 1
        if not moves:
            break
    else:
        raise AssertionError("moves never end")
    assert set(moved.values()) <= {1}
    counts = [len(names) for names in on.values()]
    assert step_ms(max(counts)) <= BEHIND * step_ms(min(counts) + 1) + 1e-9 or max(counts) < 2
