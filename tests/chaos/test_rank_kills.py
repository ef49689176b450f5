"""kill -9 and SIGSTOP of leaders and of other ranks under load: every answer exact or an explicit error, nothing left.

One strike of each kind. `python -m benchmarks.rank_kills` does forty, and says how long each took.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from diptych.v1 import generate_pb2

from tests.support.chaos.cases import LOCAL, Case
from tests.support.chaos.clients import Attempt, Ledger, Load, record_answers
from tests.support.chaos.cluster import leaked_shared_memory, shared_memory
from tests.support.chaos.rank_kills import (
    RanksCluster,
    Strike,
    Striker,
    cases_of,
    dead_sockets,
    gap_s,
    plan,
    wrong_references,
)
from tests.support.chaos.verdict import judge

RANKS = {"prefill-0": 2, "decode-0": 2, "decode-1": 1}
STRIKES = [
    Strike("decode-0", 1, "kill", 1.0),
    Strike("prefill-0", 1, "stop", 0.7),
    Strike("decode-0", 0, "stop", 1.2),
    Strike("prefill-0", 0, "kill", 0.5),
]


def test_one_seed_is_one_plan_and_strikes_every_rank() -> None:
    first, again, other = ([*islice(plan(seed, RANKS), 10)] for seed in (1, 1, 2))
    assert first == again != other
    assert len({(strike.worker, strike.rank) for strike in first[:5]}) == sum(RANKS.values())


def test_a_gap_is_the_longest_wait_that_met_the_time() -> None:
    attempt = Attempt(Case("", (), generate_pb2.SamplingParams(), LOCAL), "generate", 0, 60.0, started=10.0)
    attempt.arrivals, attempt.ended = [11.0, 14.0, 14.5, 20.0], 20.1
    assert gap_s(attempt, 12.0, 14.2) == 3.0
    assert gap_s(attempt, 12.0, 16.0) == 5.5, "it began within"
    assert gap_s(attempt, 10.5, 10.9) == 1.0, "the first token is waited for, too"
    assert gap_s(attempt, 21.0, 22.0) == 0.0


@pytest.mark.long
@pytest.mark.timeout(420)
def test_a_rank_that_is_struck_costs_no_answer(tmp_path: Path, small_model: Path, tokenizer: Any) -> None:
    memory = shared_memory()
    cases = cases_of(tokenizer)
    cluster = RanksCluster(
        tmp_path,
        small_model,
        prefill=1,
        decode=2,
        routers=1,
        engine={"num_blocks": 160, "max_batch_tokens": 256},
        transport={"ucx_net_devices": "lo"},
        worker={"stall_s": 4.0, "transport_stall_s": 4.0},
        pace="15 0.4",
        forked=True,
        ranks=RANKS,
    )
    try:
        cluster.start(120.0)
        answers = record_answers(cluster, cases)
        assert not wrong_references(small_model, cases, answers)
        ledger = Ledger()
        load = Load(cluster, ledger, cases, 1, deadline_s=60.0).start()
        striker = Striker(cluster, ledger)
        try:
            striker.run(STRIKES, lambda line: print(line, flush=True))
        finally:
            stuck = load.stop()
        verdict = judge(ledger.all(), striker.injected, answers)
        assert not verdict.problems(), "\n".join(verdict.problems()[:20]) + f"\n{cluster.logs()}"
        assert not stuck
        assert not [one.left for one in striker.struck if one.left]
        assert any(a.finished and a.finished.recoveries for a in ledger.all()), "no strike hit an answer"
        assert not dead_sockets(cluster)
        cluster.assert_nothing_left()
    finally:
        cluster.stop()
    assert not cluster.left_processes()
    assert not leaked_shared_memory(memory, [pid for _, pid in cluster.spawned])
