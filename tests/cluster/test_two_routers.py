"""Two routers over the same workers: neither hears of the other, and clients number their requests alike."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diptych.v1 import generate_pb2, generate_pb2_grpc

from tests.cluster.conftest import PACE
from tests.support.chaos.cluster import ChaosCluster
from tests.support.processes import Reply
from tests.support.prompts import reference_greedy, tokens_of

ROUNDS, MAX_TOKENS = 6, 8


def test_the_same_request_ids_on_both_routers_get_their_own_answers(
    tmp_path: Path, small_model: Path, tokenizer: Any
) -> None:
    """Both routers start their numbers at 1: a handoff that were named by them alone would serve the other's KV."""
    prompts = [tokens_of(tokenizer, 160, seed) for seed in (1, 2)]
    expected = [reference_greedy(str(small_model), prompt, MAX_TOKENS) for prompt in prompts]
    assert expected[0] != expected[1]
    cluster = ChaosCluster(
        tmp_path,
        small_model,
        prefill=1,
        decode=1,
        engine={"num_blocks": 256, "max_batch_tokens": 128},
        transport={"ucx_net_devices": "lo"},  # no digests: nothing but names keeps the two apart
        pace=PACE,
        forked=True,
    )

    def ask(router: int, number: int) -> list[int]:
        stub = generate_pb2_grpc.GenerateServiceStub(cluster.channels[router])
        request = cluster.request(
            prompts[router],
            generate_pb2.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True),
            generate_pb2.PLACEMENT_SPLIT,
            request_id=f"job-{number}",
            cache_salt=f"{router}-{number}",
        )
        reply = Reply()
        for response in stub.Generate(request, timeout=60):
            reply.take(response)
        assert reply.split
        return reply.token_ids

    try:
        cluster.start()
        with ThreadPoolExecutor(2) as threads:
            for number in range(ROUNDS):
                answers = list(threads.map(ask, (0, 1), (number, number)))
                assert [a[: len(e)] for a, e in zip(answers, expected, strict=True)] == expected
        cluster.assert_nothing_left()
    finally:
        cluster.stop()
