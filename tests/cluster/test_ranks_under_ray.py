"""Under Ray Serve: a prefill worker of one process, and a group of decode workers of two ranks each. Answers are
exact; a rank that is killed ends its replica, and the replica comes back whole, with nothing left of the one before.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from diptych.v1 import cluster_pb2, generate_pb2, generate_pb2_grpc

from tests.chaos.test_ray import Seen, on_ray, pid_of, until
from tests.support.checkpoints import saved_model, saved_tokenizer
from tests.support.processes import Reply
from tests.support.prompts import reference_greedy

DECODE = cluster_pb2.ROLE_DECODE
SETTINGS: dict[str, Any] = {
    "engine": {"num_blocks": 64, "block_tokens": 8, "max_batch_tokens": 64, "max_running_sequences": 16,
               "dtype": "float32", "threads": 1, "kernels": "torch"},
    "transport": {"ucx_net_devices": "lo"},
    "router": {"itl_target_ms": 20.0},
    "telemetry": {"metrics_port": None, "worker_metrics_port": None},
    "prefill": {"replicas": 1},
    "decode": {"groups": {"pair": {"num_cpus": 0.5, "engine": {"tensor_parallel": 2}}}},
}  # fmt: skip


def ranks_of(leader: int) -> list[psutil.Process]:
    return [one for one in psutil.Process(leader).children() if "engine.ranks.follower" in one.cmdline()]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_replica_of_two_ranks_answers_and_comes_back_whole(tmp_path: Path) -> None:
    model = saved_model(
        tmp_path / "model", "Qwen3", num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1
    )
    saved_tokenizer(model)
    prompts = [[3 + (i * i * 7 + i * 31 + seed * 101) % 280 for i in range(20 + 60 * seed)] for seed in range(2)]
    asked = [(prompt, reference_greedy(str(model), prompt, 12)) for prompt in prompts]
    with on_ray(tmp_path, model, given=SETTINGS) as (_, addresses), grpc.insecure_channel(addresses[0]) as channel:
        seen, stub = Seen(channel), generate_pb2_grpc.GenerateServiceStub(channel)

        def check_answers() -> None:
            for prompt, expected in asked:
                for placement in (generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL):
                    request = generate_pb2.GenerateRequest(
                        token_ids=generate_pb2.TokenIds(ids=prompt),
                        sampling=generate_pb2.SamplingParams(max_tokens=12, ignore_eos=True),
                        placement=placement,
                        cache_salt=f"{placement}",
                    )
                    reply = Reply()
                    for response in stub.Generate(request, timeout=60):
                        reply.take(response)
                    assert reply.token_ids == expected
                    assert reply.split is (placement == generate_pb2.PLACEMENT_SPLIT)
            until(seen.is_empty, 20, "nothing left")

        def worker() -> Any:
            (found,) = [w for w in seen.state().workers if (w.worker_id, w.epoch) in seen.ready(DECODE)]
            return found

        first = worker()
        assert first.group == "pair"
        assert first.worker_id.startswith("decode-pair-")
        assert "2 ranks" in first.attention_backend
        check_answers()
        leader = psutil.Process(pid_of(first.worker_id))
        (rank,) = ranks_of(leader.pid)
        os.kill(rank.pid, signal.SIGKILL)
        took = until(
            lambda: seen.ready(DECODE) not in (set(), {(first.worker_id, first.epoch)}), 180, "another replica"
        )
        print(f"replica of two ranks back after {took:.1f} s")
        second = worker()
        assert second.group == "pair"
        until(lambda: not leader.is_running() and not rank.is_running(), 20, "the processes of the first one are gone")
        new_leader = psutil.Process(pid_of(second.worker_id))
        (new_rank,) = ranks_of(new_leader.pid)
        check_answers()
    for process in (new_leader, new_rank):
        process.wait(20)
