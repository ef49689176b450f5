"""Faults at random moments on a cluster of real processes: every answer exact or an explicit error, and nothing left.

Twelve seconds of faults in `make test`, on a small model at the pace of a large one; forty in `make test-long`, on the
embedded model. CHAOS_SEED and CHAOS_DURATION (seconds of faults) choose the plan and its length; `make chaos` sets
them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import table
from tests.support.chaos.cases import big_cases_of, cases_of
from tests.support.chaos.clients import Ledger, Load, record_answers
from tests.support.chaos.cluster import ChaosCluster, leaked_shared_memory, shared_memory
from tests.support.chaos.faults import Driver, plan
from tests.support.chaos.verdict import HEADER, judge
from tests.support.prompts import reference_greedy
from tests.support.tiers import tiered

SEED = int(os.environ.get("CHAOS_SEED") or 7442)
ASKED_S = os.environ.get("CHAOS_DURATION")
LENGTHS = [(float(ASKED_S), "embedded")] if ASKED_S else tiered([(12.0, "small")], [(40.0, "embedded")])
LINK_BYTES_PER_S = {"small": 0.45e6, "embedded": 40e6}  # as much KV a second in either model's tokens
FILES_OVER_BASELINE = 12  # connections that come and go


def cluster_of(directory: Path, model: Path, link_bytes_per_s: float, pace: str) -> ChaosCluster:
    """Small pools, and one decode worker with a slow link, so that faults meet transfers under way."""
    return ChaosCluster(
        directory,
        model,
        prefill=2,
        decode=2,
        engine={"num_blocks": 80, "max_batch_tokens": 256},
        transport={"digest": True, "ucx_net_devices": "lo"},
        by_worker={"decode-1": {"transport": {"slow_bytes_per_s": link_bytes_per_s}}},
        router={"itl_target_ms": 50.0},
        pace=pace,
        forked=bool(pace),
    )


def pulls(ledger: Ledger) -> int:
    """Requests that the router sent to pull a prefix from another worker."""
    return sum(a.route is not None and any(e.name == "pull_ms" for e in a.route.estimates) for a in ledger.all())


def test_one_seed_is_one_plan(tmp_path: Path) -> None:
    cluster = ChaosCluster(tmp_path, tmp_path, prefill=2, decode=2)
    first, again, other = plan(7, cluster), plan(7, cluster), plan(8, cluster)
    faults = [next(first) for _ in range(40)]
    assert faults == [next(again) for _ in range(40)]
    assert faults != [next(other) for _ in range(40)]


@pytest.mark.timeout(float(ASKED_S or 40) * 2 + 240)
@pytest.mark.parametrize(("duration_s", "kind"), LENGTHS)
def test_every_answer_is_exact_or_an_explicit_error(
    tmp_path: Path, model_path: Path, small_model: Path, tokenizer: Any, duration_s: float, kind: str
) -> None:
    model = small_model if kind == "small" else model_path
    print(f"\nseed {SEED}, {duration_s:g} s of faults", flush=True)
    memory_before = shared_memory()
    cases, big_cases = cases_of(tokenizer), big_cases_of(tokenizer)
    link_bytes_per_s = LINK_BYTES_PER_S[kind]
    cluster = cluster_of(tmp_path, model, link_bytes_per_s, "15 0.4" if kind == "small" else "")
    try:
        cluster.start()
        answers = record_answers(cluster, [*cases, *big_cases])
        for case in [c for c in cases if c.greedy][:4]:
            expected = reference_greedy(str(model), case.prompt, case.sampling.max_tokens)
            assert list(answers[case.name].token_ids[: len(expected)]) == expected, f"undisturbed: {case.name}"
        cluster.assert_nothing_left()
        files_before = cluster.open_files()
        ledger = Ledger()
        load = Load(cluster, ledger, cases, SEED).start()
        driver = Driver(cluster, ledger, load, cases, big_cases, slow_bytes_per_s=link_bytes_per_s / 5)
        try:
            driver.run(plan(SEED, cluster), duration_s, lambda line: print(line, flush=True))
        finally:
            stuck = load.stop()
        verdict = judge(ledger.all(), driver.injected, answers)
        print()
        table(HEADER, verdict.rows)
        told = f"{pulls(ledger)} with a pulled prefix, {verdict.went_on} went on elsewhere, errors {verdict.errors}"
        print(f"{verdict.complete} complete, {told}", flush=True)
        assert not verdict.problems(), f"seed {SEED}\n" + "\n".join(verdict.problems()[:20]) + f"\n{cluster.logs()}"
        assert not stuck, f"seed {SEED}: clients hang: {stuck}"
        failed = [a for a in ledger.all() if a.outcome == "error" and a.deadline_s >= 10 and a.from_server]
        assert verdict.complete > 5 * len(failed), f"seed {SEED}: too few survive:\n" + "\n".join(map(str, failed[:20]))
        cluster.assert_nothing_left()
        grown = {
            name: (files_before[name], count)
            for name, count in cluster.open_files().items()
            if count > files_before[name] + FILES_OVER_BASELINE
        }
        assert not grown, f"seed {SEED}: open files before and after: {grown}"
    finally:
        cluster.stop()
    assert not cluster.left_processes()
    assert not leaked_shared_memory(memory_before, [pid for _, pid in cluster.spawned])
