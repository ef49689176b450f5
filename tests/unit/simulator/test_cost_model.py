from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulator.cost_model import CostModelError, StepCost, from_json, load, preset, save, to_json
from simulator.spec import ClusterSpec

STEP = StepCost(2.0, 0.01, 0.03, 0.0001, 1e-6, 4.0)


def test_a_step_is_the_sum_of_its_parts() -> None:
    assert STEP.ms(10, 10, 1000, 0) == pytest.approx(2 + 0.1 + 4.0 + 0.1), "few tokens: the floor"
    assert STEP.ms(1, 1000, 0, 1000 * 500) == pytest.approx(2 + 0.01 + 30 + 0.5), "many: each costs"


def test_a_prompt_in_chunks_has_all_pairs_once() -> None:
    whole, chunked = STEP.prompt_ms(1000, 1000), STEP.prompt_ms(1000, 250)
    assert chunked - whole == pytest.approx(3 * 2.01), "three more steps, nothing else"
    assert STEP.prompt_ms(500, 500, start=500) > STEP.prompt_ms(500, 500)


def test_files_go_round(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    model = preset("h200-8b")
    save(model, path)
    assert load(path) == model


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "x"}, "not a cost model"),
        ({"colour": 1}, "unknown keys colour"),
        ({"step": {"constant_ms": 1}}, "per_sequence_ms"),
        ({"step": {**to_json(preset("h200-8b"))["step"], "floor_ms": -1}}, "floor_ms"),
        ({"kv_bytes_per_token": 0}, "at least 1"),
    ],
)
def test_a_bad_file_is_refused_with_the_cause(change: dict, complaint: str) -> None:
    data = json.loads(json.dumps({**to_json(preset("h200-8b")), **change}))
    with pytest.raises(CostModelError, match=complaint):
        from_json(data, "file.json")


def test_rooflines_are_in_the_right_places() -> None:
    small, large = preset("h200-8b"), preset("h200x4-70b")
    assert (small.kv_bytes_per_token, large.kv_bytes_per_token) == (131072, 327680)
    assert small.step.floor_ms == pytest.approx(4.2, abs=0.1), "16 GB of weights over 3.84 TB/s"
    assert 25_000 < 8192 / small.step.prompt_ms(8192, 8192) * 1e3 < 40_000
    assert 8_000 < 8192 / large.step.prompt_ms(8192, 8192) * 1e3 < 20_000
    assert not small.measured
    with pytest.raises(CostModelError, match="h200-8b"):
        preset("abacus")


def test_rounded_numbers_are_fewer_bytes_and_more_room() -> None:
    plain, int8, int4, kv8 = (preset(f"h200-8b{scheme}") for scheme in ("", "-int8", "-int4", "-kv8"))
    rounded = 3 * 32 * 4096 * 14336 / 3.84e12 * 1e3  # ms to read a byte of each weight of the feed-forward blocks
    assert plain.step.floor_ms - int8.step.floor_ms == pytest.approx(rounded * (1 - 2 / 128))
    assert plain.step.floor_ms - int4.step.floor_ms == pytest.approx(rounded * (1.5 - 2 / 128))
    assert preset("h200-8b-fp8").step == int8.step, "as many bits"
    assert int8.step.per_token_ms == plain.step.per_token_ms, "they are multiplied as they were"
    assert kv8.kv_bytes_per_token == 2 * 32 * 8 * (128 + 2)
    assert kv8.kv_capacity_tokens > 1.9 * plain.kv_capacity_tokens
    assert int8.kv_capacity_tokens > plain.kv_capacity_tokens
    assert "expanded them for nothing" in int8.source


def test_schemes_are_of_presets_and_of_known_words() -> None:
    cluster = ClusterSpec.model_validate({"decode": {"workers": 1, "cost_model": "h200x2-8b"}})
    rounded = cluster.with_schemes("int4-kv8")
    assert (rounded.cost_model, rounded.decode.cost_model) == ("h200-8b-int4-kv8", "h200x2-8b-int4-kv8")
    assert rounded.prefill.cost_model == "", "the cluster's"
    with pytest.raises(CostModelError, match="no preset"):
        cluster.with_schemes("int3")
    with pytest.raises(CostModelError, match="needs a preset"):
        ClusterSpec(cost_model="./mine.json").with_schemes("int8")


def test_the_measured_model_of_the_cpu_engine_is_readable() -> None:
    model = load(Path(__file__).parents[3] / "benchmarks" / "results" / "cost-model.json")
    assert model.measured
    assert "benchmarks.step_cost" in model.source
    assert model.step.ms(1, 512, 0, 512 * 256) > model.step.ms(1, 1, 128, 0) > 0


def test_a_cost_model_is_looked_for_beside_the_cluster_file(tmp_path: Path) -> None:
    save(preset("h200-8b"), tmp_path / "mine.json")
    spec = ClusterSpec(cost_model="mine.json").beside(tmp_path / "cluster.yaml")
    assert spec.costs().step == preset("h200-8b").step
    assert ClusterSpec().beside(tmp_path / "cluster.yaml") == ClusterSpec()
