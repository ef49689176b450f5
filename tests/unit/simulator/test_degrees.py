"""What a tensor-parallel degree does to both pools, on paper."""

from __future__ import annotations

import itertools

import pytest

from simulator.cost_model import H200, LLAMA_8B, LLAMA_70B, CostModelError, exchange, preset, preset_of, roofline
from simulator.degrees import figures, splits
from simulator.fast import FastCluster
from simulator.planner import Mix
from simulator.policies import by_name
from simulator.spec import ClusterSpec, PoolSpec
from simulator.traces import Trace, TraceRequest

MIX = Mix(4000.0, 300.0)


def test_a_higher_degree_is_quicker_and_costs_throughput_of_each_device() -> None:
    found = figures("h200-8b", (1, 2, 4, 8), MIX, 50.0, 8192)
    for less, more in itertools.pairwise(found):
        assert more.ttft_ms < less.ttft_ms
        assert more.prompt_exchange_share > less.prompt_exchange_share
        assert more.decode_exchange_share > less.decode_exchange_share
        assert more.prompt_tokens_per_s < less.prompt_tokens_per_s
        assert more.kv_tokens / more.degree > less.kv_tokens / less.degree, "one copy of the weights for more memory"
    assert found[0].prompt_exchange_share == found[0].decode_exchange_share == 0
    assert all(one.itl_ms <= 50.0 for one in found)


def test_what_nvlink_costs_is_in_the_step() -> None:
    for degree in (2, 4, 8):
        token_ms, step_ms = exchange(H200, LLAMA_70B, degree)
        step = roofline(H200, LLAMA_70B, degree).step
        flops = H200.matmul_flops * H200.matmul_share * degree
        assert step.per_token_ms == pytest.approx(2 * LLAMA_70B.parameters / flops * 1e3 + token_ms)
        # 160 exchanges of 8192 values of two bytes, 2 (n - 1) / n of them over a link of 450 GB/s.
        assert token_ms == pytest.approx(160 * 16384 * 2 * (degree - 1) / degree / 450e9 * 1e3)
        assert step_ms == pytest.approx(1.6)
    assert exchange(H200, LLAMA_8B, 1) == (0.0, 0.0)


def test_with_fewer_kv_heads_than_ranks_memory_for_kv_does_not_grow_with_them() -> None:
    eight, sixteen = roofline(H200, LLAMA_8B, 8), roofline(H200, LLAMA_8B, 16)
    assert sixteen.kv_capacity_tokens < 1.1 * eight.kv_capacity_tokens
    assert sixteen.step.per_context_token_ms == pytest.approx(eight.step.per_context_token_ms)


def test_degrees_over_which_a_model_does_not_fit_are_left_out() -> None:
    assert [one.degree for one in figures("h200x4-70b", (1, 2, 4), MIX, 50.0, 8192)] == [2, 4]
    with pytest.raises(CostModelError, match="ask for more"):
        figures("h200x4-70b", (1,), MIX, 50.0, 8192)
    assert preset_of("h200x4-70b", 1) == "h200-70b"
    assert preset(preset_of("h200-8b", 2)).name == "8B on 2 x H200"
    with pytest.raises(CostModelError, match="no preset"):
        preset("h200x3-8b")


def test_devices_are_dealt_out_so_that_neither_pool_waits() -> None:
    found = figures("h200-8b", (1, 2, 4), MIX, 50.0, 8192)
    pairs = splits(found, MIX, 8)
    assert {(s.prefill_degree, s.decode_degree) for s in pairs} == {(p, d) for p in (1, 2, 4) for d in (1, 2, 4)}
    assert [s.requests_per_s for s in pairs] == sorted((s.requests_per_s for s in pairs), reverse=True)
    by_degree = {one.degree: one for one in found}
    for s in pairs:
        assert s.devices <= 8
        prefills = s.prefill * by_degree[s.prefill_degree].requests_per_s(MIX)[0]
        decodes = s.decode * by_degree[s.decode_degree].requests_per_s(MIX)[1]
        assert s.requests_per_s == pytest.approx(min(prefills, decodes))
    assert splits(found, MIX, 1) == []


def test_pools_of_two_degrees_are_simulated() -> None:
    requests = [TraceRequest(i / 4, 3000, 40) for i in range(30)]
    trace = Trace("made", requests, 16)
    gaps = {}
    for decode in ("h200-8b", "h200x4-8b"):
        spec = ClusterSpec(
            prefill=PoolSpec(workers=1, cost_model="h200x2-8b", nic_gbytes_per_s=50),
            decode=PoolSpec(workers=2, cost_model=decode),
        )
        outcomes = FastCluster(spec, spec.costs(), by_name("always-split"), 1).run(trace)
        assert all(one.finished for one in outcomes)
        gaps[decode] = max(one.tpot_ms for one in outcomes)
    assert gaps["h200x4-8b"] < gaps["h200-8b"]


def test_pools_of_two_models_are_an_error() -> None:
    spec = ClusterSpec(prefill=PoolSpec(workers=1, cost_model="h200x4-70b"))
    with pytest.raises(CostModelError, match="two models"):
        spec.costs_of(spec.prefill, spec.costs())
    with pytest.raises(ValueError, match="fidelity: fast"):
        ClusterSpec(prefill=PoolSpec(workers=1, cost_model="h200x2-8b"), fidelity="exact")
