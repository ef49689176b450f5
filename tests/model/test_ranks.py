"""A model over several processes answers as transformers does alone: token by token, in float32.

Every family that engine/ranks/cuts.py serves is here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check.models import make_core
from engine.beams import BeamAnswer, BeamParams
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.model_errors import ModelLoadError, RankLost
from engine.ranks import leader
from engine.ranks.cuts import FAMILIES
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec
from tests.model.test_unpacked import fp8, pack, plain_model
from tests.support.checkpoints import saved_model
from tests.support.courses import answer_alone, generated, run_course
from tests.support.families import reference_of, saved_family
from tests.support.rank_processes import quick_ranks
from tests.support.rounded import model_with_rounded_weights
from tests.support.tiers import tiered


@pytest.fixture(autouse=True)
def _forked() -> Iterator[None]:
    with quick_ranks():
        yield


def config(path: Path, ranks: int, groups: int = 1, **more: Any) -> EngineConfig:
    return EngineConfig.model_validate(
        {
            "model": str(path), "dtype": "float32", "num_blocks": 64, "block_tokens": 8, "device": "cpu", "threads": 1,
            "tensor_parallel": ranks, "expert_parallel": groups, **more,
        }
    )  # fmt: skip


@pytest.fixture
def runners() -> Iterator[list[ModelRunner]]:
    made: list[ModelRunner] = []
    yield made
    for runner in made:
        runner.close()


# Families by what is special in them; each degree has keys and values on one rank, or (4 of 2 heads) on two.
QUICK = [("qwen3", 2, 1), ("gpt_oss", 2, 2), ("deepseek_v3", 2, 1), ("mixtral", 4, 2)]
REST = [
    (family, ranks, groups)
    for family in sorted(FAMILIES)
    for ranks, groups in ((2, 1), (2, 2), (4, 1), (4, 2))
    if (family, ranks, groups) not in QUICK
]


@pytest.mark.parametrize(("family", "ranks", "groups"), tiered(QUICK, REST))
def test_answers_are_those_of_one_process(
    tmp_path: Path, runners: list[ModelRunner], family: str, ranks: int, groups: int
) -> None:
    path = saved_family(tmp_path, family)
    runner = ModelRunner(config(path, ranks, groups))
    runners.append(runner)
    assert f", {ranks} ranks" in runner.forward.name
    course, reference = run_course(runner), reference_of(path, family)
    for prompt, answer in course.asked:
        assert answer == generated(reference, prompt, len(answer)), f"{len(prompt)} tokens"


@pytest.mark.parametrize("quantization", ["fp8", "int4"])
def test_quantized_weights_are_those_of_one_process(
    tmp_path: Path, runners: list[ModelRunner], quantization: str
) -> None:
    """Each rank rounds its own part."""
    groups = ("attention", "mlp")
    path = saved_family(tmp_path, "llama", {"intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64})
    runner = ModelRunner(config(path, 2, quantization=quantization, quantized_groups=groups))
    runners.append(runner)
    assert runner.describe_path().endswith(f"{quantization} attention+mlp weights"), "kept by native kernels"
    course, reference = run_course(runner), model_with_rounded_weights(path, quantization, groups)
    for prompt, answer in course.asked:
        assert answer == generated(reference, prompt, len(answer)), f"{len(prompt)} tokens"


@pytest.mark.parametrize(
    ("family", "ranks", "groups", "inner", "quantization"),
    tiered([("gpt_oss", 2, 2, 264, "int4")], [("mixtral", 2, 1, 256, "int8"), ("mixtral", 4, 2, 256, "int4")]),
)
def test_quantized_experts_are_those_of_one_process(
    tmp_path: Path, runners: list[ModelRunner], family: str, ranks: int, groups: int, inner: int, quantization: str
) -> None:
    """Whole, or cut by their inner width."""
    path = saved_family(tmp_path, family, {"intermediate_size": inner, "hidden_size": 160})
    runner = ModelRunner(config(path, ranks, groups, quantization=quantization))
    runners.append(runner)
    assert runner.describe_path().endswith(f"{quantization} mlp weights"), "kept by native kernels"
    course, reference = run_course(runner), model_with_rounded_weights(path, quantization, ("mlp",))
    for prompt, answer in course.asked:
        assert answer == generated(reference, prompt, len(answer)), f"{len(prompt)} tokens"


def test_experts_that_are_no_whole_groups_are_refused(tmp_path: Path) -> None:
    path = saved_family(tmp_path, "mixtral", {"intermediate_size": 200})
    with pytest.raises(ModelLoadError, match=r"experts\.down_proj would not be cut .*raise engine\.expert_parallel"):
        ModelRunner(config(path, 2, quantization="int8"))


def test_parts_that_are_no_whole_groups_are_refused(tmp_path: Path) -> None:
    path = saved_family(tmp_path, "llama", {"intermediate_size": 320})
    with pytest.raises(ModelLoadError, match=r"down_proj\.weight would not be cut between groups of 128"):
        ModelRunner(config(path, 2, quantization="int8"))


def sampled(runner: ModelRunner) -> list[int]:
    params = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, top_k=40, seed=7, repetition_penalty=1.1)
    return answer_alone(runner, range(3, 40), params)


def test_sampling_with_a_seed_is_that_of_one_process(tmp_path: Path, runners: list[ModelRunner]) -> None:
    path = saved_family(tmp_path, "mixtral")
    runners += [ModelRunner(config(path, 1)), ModelRunner(config(path, 2, 2))]
    alone, together = map(sampled, runners)
    assert alone == together
    load, whole = runners[1].expert_load, runners[0].expert_load
    assert load is not None
    assert whole is not None
    assert load.routed() == whole.routed() > 0, "a row was dropped, or counted twice"
    assert sum(load.by_group().values()) == load.routed()
    assert sorted(load.by_group()) == ["0", "1"]


def searched(runner: ModelRunner) -> list[BeamAnswer]:
    core = make_core(runner, 32)
    spec = SequenceSpec(1, list(range(3, 16)), SamplingParams(max_tokens=10), beams=BeamParams(3, 3))
    assert core.add(spec, 0.0) is None
    found: list[BeamAnswer] = []
    while (plan := core.schedule(0.0)) is not None:
        for _, answers in core.commit(plan, runner.execute(plan), 0.0).beams:
            found += answers
    core.check()
    assert core.is_idle()
    return found


def test_a_beam_search_is_that_of_one_process(tmp_path: Path, runners: list[ModelRunner]) -> None:
    """Every rank copies its part of the blocks that beams begin with."""
    path = saved_family(tmp_path, "qwen3")
    runners += [ModelRunner(config(path, ranks)) for ranks in (1, 2)]
    alone, together = map(searched, runners)
    assert len(alone) == 3
    assert [one.token_ids for one in alone] == [one.token_ids for one in together]


def test_kv_in_8_bits_is_that_of_one_process(tmp_path: Path, runners: list[ModelRunner]) -> None:
    """Each rank rounds its own heads."""
    path = saved_family(tmp_path, "gpt_oss")
    runners += [ModelRunner(config(path, ranks, kv_dtype="int8")) for ranks in (1, 2)]
    assert runners[0].facts.groups == runners[1].facts.groups
    assert runners[0].block_bytes == 2 * runners[1].block_bytes
    alone, together = (answer_alone(runner, range(3, 40), SamplingParams(max_tokens=8)) for runner in runners)
    assert alone == together


def test_a_model_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    path = saved_family(tmp_path, "llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96})
    with pytest.raises(ModelLoadError, match="cannot be split over 4 ranks: its 6 attention heads are no multiple"):
        ModelRunner(config(path, 4))


def test_a_family_that_was_not_compared_is_refused(tmp_path: Path) -> None:
    path = saved_family(tmp_path, "phi3")
    with pytest.raises(ModelLoadError, match="Phi3ForCausalLM cannot be split over 2 ranks: its family"):
        ModelRunner(config(path, 2))


def test_a_killed_rank_ends_the_worker_with_its_name(tmp_path: Path, runners: list[ModelRunner]) -> None:
    import os
    import signal

    runner = ModelRunner(config(saved_family(tmp_path, "llama"), 2))
    runners.append(runner)
    first = runner.leader
    assert first is not None
    lost: list[RankLost] = []
    first.watch(lost.append)
    os.kill(first.processes[0], signal.SIGKILL)
    with pytest.raises(RankLost, match=r"rank 1 \(process \d+\) was killed by SIGKILL"):
        sampled(runner)
    assert "rank 1" in str(lost[0])


def test_a_worker_that_is_killed_while_its_ranks_meet_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    left: list[list[Path]] = []

    def meet(*_: Any) -> None:
        left.append(list(temporary.glob("diptych*")))
        raise RankLost("it is killed here")

    monkeypatch.setattr(leader, "Group", meet)
    monkeypatch.setattr(leader, "_END_S", 0.1)  # the other rank still waits for this one
    with pytest.raises(ModelLoadError, match="it is killed here"):
        ModelRunner(config(saved_family(tmp_path, "llama"), 2))
    assert left == [[]]


def test_a_step_that_fails_on_all_ranks_alike_fails_alone(tmp_path: Path, runners: list[ModelRunner]) -> None:
    runner = ModelRunner(config(saved_family(tmp_path, "llama"), 2))
    runners.append(runner)
    before = sampled(runner)
    core = EngineCore(EngineLimits(8, 20, 8, 8, 256, 1 << 20), BlockPool(runner.num_blocks))
    assert core.add(SequenceSpec(1, [5, 1 << 19, 7], SamplingParams(max_tokens=2)), 0.0) is None
    plan = core.schedule(0.0)
    assert plan is not None
    with pytest.raises(IndexError):  # no such token in the vocabulary
        runner.execute(plan)
    assert sampled(runner) == before


@pytest.mark.long
def test_numbers_of_a_checkpoint_are_kept_by_each_rank(tmp_path: Path, runners: list[ModelRunner]) -> None:
    """Blocks of fp8, cut between ranks at a multiple of their columns."""
    size = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = saved_model(tmp_path / "model", num_key_value_heads=2, **size)
    packed, plain = pack(model, tmp_path, section, lambda weight: fp8(weight, 128))
    runner = ModelRunner(config(packed, 2))
    runners.append(runner)
    assert runner.describe_path().endswith("weights kept as they are stored (fp8, blocks of 128 x 128)")
    course, reference = run_course(runner), plain_model(plain)
    for prompt, answer in course.asked:
        assert answer == generated(reference, prompt, len(answer)), f"{len(prompt)} tokens"
