"""kill -9 of the worker that gives a running answer away, and of the one that takes it, in each phase of the move, over
real processes: the answer is the undisturbed one, and nothing is left.

A phase lasts some steps: it is watched for, and tried again where the kill came late.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diptych.v1 import generate_pb2

from tests.support.chaos.cases import LOCAL, Case
from tests.support.chaos.clients import Ledger, generate, record_answers
from tests.support.chaos.cluster import ChaosCluster
from tests.support.chaos.faults import Driver, Fault
from tests.support.chaos.moving import PHASES
from tests.support.prompts import tokens_of

TRIES = 10

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[ChaosCluster]:
    cluster = ChaosCluster(
        tmp_path_factory.mktemp("killed-moves"),
        small_model,
        prefill=1,
        decode=2,
        routers=1,
        engine={"num_blocks": 256, "max_batch_tokens": 256, "batch_invariant": True},
        transport={"digest": True, "ucx_net_devices": "lo", "slow_bytes_per_s": 0.3e6},
        pace="15 0.4",
        forked=True,
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.mark.parametrize("victim", ["source", "target"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_each_phase_costs_no_token(cluster: ChaosCluster, tokenizer: Any, victim: str, phase: str) -> None:
    params = generate_pb2.SamplingParams(max_tokens=200, ignore_eos=True)
    case = Case("an answer that moves", tuple(tokens_of(tokenizer, 60, seed=3)), params, LOCAL)
    expected = record_answers(cluster, [case])[case.name]
    rng, hit = random.Random(f"{victim} {phase}"), []
    for number in range(TRIES):
        ledger = Ledger()
        arguments = (cluster, ledger, case, 0, 60.0, f"{number}")
        client = threading.Thread(target=generate, args=arguments, daemon=True)
        client.start()
        driver = Driver(cluster, ledger, None, [], [])  # type: ignore[arg-type]
        record = driver.kill_at_a_move(Fault(f"kill {victim}", seed=rng.getrandbits(32)), phase)
        client.join(60.0)
        (attempt,) = ledger.all()
        assert attempt.outcome == "complete", f"{attempt}\n{cluster.logs()}"
        assert tuple(attempt.token_ids) == expected.token_ids
        assert attempt.text == expected.text
        assert not attempt.wrong_positions
        hit += record.phases
        if f"{victim}: {phase}" in hit:
            break
    print(f"{victim} {phase}: {hit}")
    assert f"{victim}: {phase}" in hit, f"never met in {TRIES} tries: {hit}"
    cluster.assert_nothing_left()
