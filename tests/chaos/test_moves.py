"""Drains, role switches, moves and kills on a cluster of real processes under long answers: none fails, none is wrong.

A hundred faults in `make chaos` (FAULTS=100 SEED=1, some twelve minutes), fourteen in `make test-long` (two minutes).
Every kind comes once before any comes again. Somebody is always there to go on with an answer, so that all must be
complete, token by token the undisturbed ones; nothing is left of them afterwards.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import table
from tests.support.chaos.cases import lasting_cases_of
from tests.support.chaos.clients import Ledger, Load, record_answers
from tests.support.chaos.cluster import ChaosCluster, leaked_shared_memory, shared_memory
from tests.support.chaos.faults import HARMLESS, Driver, plan
from tests.support.chaos.verdict import HEADER, judge
from tests.support.prompts import reference_greedy

SEED = int(os.environ.get("CHAOS_SEED") or 5)
FAULTS = int(os.environ.get("CHAOS_FAULTS") or 14)
LINK_BYTES_PER_S = 0.3e6  # a thousand tokens take two seconds: moves are under way when faults hit
DEADLINE_S = 300.0  # of answers that take twenty seconds: a busy machine is no fault


def cluster_of(directory: Path, model: Path) -> ChaosCluster:
    """Batches differ with every fault, and answers of a thousand tokens meet every tie: hence batch_invariant."""
    slow = {"transport": {"slow_bytes_per_s": LINK_BYTES_PER_S}}
    return ChaosCluster(
        directory,
        model,
        prefill=2,
        decode=3,
        engine={"num_blocks": 640, "max_batch_tokens": 256, "batch_invariant": True},
        transport={"digest": True, "ucx_net_devices": "lo"},
        by_worker={"decode-1": slow, "decode-2": slow},
        pace="15 0.4",
        forked=True,
    )


@pytest.mark.long
@pytest.mark.timeout(240 + 30 * FAULTS)
def test_no_answer_fails_whoever_leaves_switches_or_dies(tmp_path: Path, small_model: Path, tokenizer: Any) -> None:
    print(f"\nseed {SEED}, {FAULTS} faults", flush=True)
    memory_before = shared_memory()
    cases = lasting_cases_of(tokenizer)
    cluster = cluster_of(tmp_path, small_model)
    try:
        cluster.start()
        answers = record_answers(cluster, cases)
        for case in cases[:2]:
            expected = reference_greedy(str(small_model), case.prompt, case.sampling.max_tokens)
            assert list(answers[case.name].token_ids) == expected, f"undisturbed: {case.name}"
        cluster.assert_nothing_left()
        ledger = Ledger()
        load = Load(cluster, ledger, cases, SEED, generate_clients=2, session_width=2, deadline_s=DEADLINE_S).start()
        driver = Driver(cluster, ledger, load, cases, [], settle_s=0.5, one_each=True)
        faults = itertools.islice(plan(SEED, cluster, HARMLESS), FAULTS)
        try:
            driver.run(faults, float("inf"), lambda line: print(line, flush=True))
        finally:
            stuck = load.stop()
        verdict = judge(ledger.all(), driver.injected, answers)
        print()
        table(HEADER, verdict.rows)
        hit = Counter(phase for one in driver.injected for phase in one.phases)
        tokens = sum(len(a.token_ids) for a in ledger.all())
        print(f"{verdict.complete} complete with {tokens} tokens, {verdict.went_on} went on elsewhere by no fault")
        print(f"errors {verdict.errors}")
        print(f"moves under way when a worker was killed, by its part: {dict(sorted(hit.items()))}", flush=True)
        failed = [a for a in ledger.all() if a.outcome != "complete"]
        assert not failed, f"seed {SEED}:\n" + "\n".join(map(str, failed[:20])) + f"\n{cluster.logs()}"
        assert not verdict.problems(), f"seed {SEED}\n" + "\n".join(verdict.problems()[:20]) + f"\n{cluster.logs()}"
        assert not stuck, f"seed {SEED}: clients hang: {stuck}"
        assert len(driver.injected) == FAULTS
        assert verdict.went_on, "nothing was moved: the test shows nothing"
        cluster.assert_nothing_left()
    finally:
        cluster.stop()
    assert not cluster.left_processes()
    assert not leaked_shared_memory(memory_before, [pid for _, pid in cluster.spawned])
