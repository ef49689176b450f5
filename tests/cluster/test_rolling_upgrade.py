"""Every process of a cluster is replaced under load, one after the other, by one with another KV layout, or with other
weights: nothing fails, and every answer is, from its first token to its last, the one that one of the two gives.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diptych.client import Answer, Client

from tests.support.chaos.cluster import ChaosCluster
from tests.support.checkpoints import saved_model, saved_tokenizer
from tests.support.prompts import forget_reference, reference_greedy

MAX_TOKENS, CLIENTS = 60, 3
LENGTHS = (12, 70, 150)
ORDER = ("router-0", "decode-0", "prefill-0", "router-1", "decode-1")


@dataclass(frozen=True, slots=True)
class Case:
    """`answers`: of the old cluster, and of the new one."""

    prompt: list[int]
    answers: tuple[list[int], list[int]]


def cases_for(old: Path, new: Path) -> list[Case]:
    """Prompts that neither model ends early."""
    rng = random.Random(5)
    drawn: dict[int, list[list[int]]] = {length: [] for length in LENGTHS}
    for length in LENGTHS:
        drawn[length] = [[rng.randrange(3, 250) for _ in range(length)] for _ in range(6)]
    answers: list[dict[int, list[list[int]]]] = []
    for path in (old, new):
        answers.append({n: [reference_greedy(str(path), p, MAX_TOKENS) for p in drawn[n]] for n in LENGTHS})
    cases = []
    for length in LENGTHS:
        found = zip(drawn[length], answers[0][length], answers[1][length], strict=True)
        whole = [Case(p, (a, b)) for p, a, b in found if len(a) == len(b) == MAX_TOKENS]
        cases.append(whole[0])
    forget_reference()
    return cases


class Load:
    """Clients that ask, one request after the other, until told to stop."""

    def __init__(self, target: str, cases: list[Case]) -> None:
        self._client = Client(target, timeout_s=200.0)
        self._cases = cases
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self.answered: Counter[str] = Counter()
        self.problems: list[str] = []
        self._threads = [threading.Thread(target=self._ask_on, daemon=True) for _ in range(CLIENTS)]

    @property
    def answers(self) -> int:
        return self.answered["old"] + self.answered["new"]

    def _ask_on(self) -> None:
        while not self._stop.is_set():
            number = next(self._numbers)
            case = self._cases[number % len(self._cases)]
            try:
                answer: Answer = self._client.generate(
                    case.prompt, max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, cache_salt=str(number % 7)
                )
            except Exception as error:
                self.problems.append(f"request {number}: {error!r}")
                continue
            self.answered["split"] += bool(answer.route.prefill_worker)
            self.answered["resumed"] += bool(answer.resumes)
            if answer.token_ids in case.answers:
                self.answered["old" if answer.token_ids == case.answers[0] else "new"] += 1
            else:
                self.problems.append(f"request {number}: {answer.token_ids} where one of {case.answers} is due")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(200.0)
        self._client.close()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("changes", ["layout", "weights"])
def test_a_cluster_is_replaced_process_by_process_and_no_request_notices(tmp_path: Path, changes: str) -> None:
    old, new = (saved_model(tmp_path / name / "tiny", **size) for name, size in sizes(changes).items())
    for path in (old, new):
        saved_tokenizer(path)
    cases = cases_for(old, new)
    assert all((case.answers[0] != case.answers[1]) == (changes == "weights") for case in cases)
    cluster = ChaosCluster(
        tmp_path,
        old,
        prefill=1,
        decode=2,
        engine={"num_blocks": 64, "max_batch_tokens": 128, "block_tokens": 32},
        transport={"ucx_net_devices": "lo"},
        worker={"drain_s": 60.0, "warm_up": False},
        router={"drain_s": 60.0, "forget_after_s": 30.0, "other_weights": "beside", "max_local_stall_steps": 0.0},
    )
    try:
        cluster.start(200.0)
        target = ",".join(cluster.target_of(i) for i in range(cluster.routers))
        with Load(target, cases) as load:
            cluster.model = new
            if changes == "layout":
                cluster.engine = {**cluster.engine, "block_tokens": 16, "num_blocks": 128}
            for name in ORDER:
                before, served = cluster.epochs(), load.answers
                print(f"{name}: {dict(load.answered)}")
                cluster.drain(name, 90.0)
                cluster.start_again(name)
                later = {name: before[name]} if name in before else {}
                cluster.wait_whole(150.0, later_than=later)
                cluster.wait_until(
                    lambda served=served: load.answers > served or bool(load.problems), 90.0, "answers while it went on"
                )
                assert not load.problems, f"{name}: {load.problems[:3]}\n{cluster.logs()}"
        print(f"in the end: {dict(load.answered)}")
        assert not load.problems, f"{load.problems[:3]}\n{cluster.logs()}"
        if changes == "weights":
            assert load.answered["old"]
            assert load.answered["new"]
        state = cluster.seen_by(0)
        assert list(state.router.other_routers) == [cluster.target_of(1)]
        assert len({w.revision for w in state.workers}) == 1
        cluster.assert_nothing_left()
    finally:
        cluster.stop()


def sizes(changes: str) -> dict[str, dict[str, Any]]:
    """Weights are drawn from one seed: another width gives others."""
    return {"old": {}, "new": {"intermediate_size": 80} if changes == "weights" else {}}
