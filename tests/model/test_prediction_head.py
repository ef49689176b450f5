"""A checkpoint's own prediction head: it says what its published form says, and no answer changes by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.draft_model import DraftModel
from engine.kv_shape import parts
from engine.model_loader import ModelLoadError
from engine.overlap import InThread
from engine.prediction_head import HeadDrafter, check_head
from engine.runner import ModelRunner
from engine.types import PlanItem, SamplingParams, SequenceSpec
from tests.model.test_draft_model import Bench, limits_of, long_prompt
from tests.model.test_families import greedy, saved
from tests.model.test_speculation import answers, made, prompts, sampled, tokens
from tests.model.test_unpacked import METHODS, pack
from tests.support.checkpoints import write_safetensors
from tests.support.prediction_heads import FAMILIES, PlainHead, with_head

BLOCK = 8
MTP = {"method": "mtp"}


def with_mtp(path: Path, **settings: Any) -> ModelRunner:
    return made(path, speculation=MTP, **settings)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_head(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> ModelRunner:
    return with_mtp(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> PlainHead:
    return PlainHead(checkpoint)


class Watched:
    """Compares all drafts with what the head says by plain code."""

    def __init__(self, reference: PlainHead, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bases: list[int] = []
        self.drafts = 0
        draft = HeadDrafter.draft

        def looked_at(drafter: HeadDrafter, items: Any) -> Any:
            found, passes = draft(drafter, items)
            for before, after in zip(items, found, strict=True):
                if after.drafts:
                    base = before.draft.base
                    assert list(after.drafts) == reference.drafts(list(after.history), len(after.drafts), base)
                    self.bases.append(base)
                    self.drafts += len(after.drafts)
            return found, passes

        monkeypatch.setattr(HeadDrafter, "draft", looked_at)


def test_it_says_what_its_published_form_says(
    checkpoint: Path, runner: ModelRunner, reference: PlainHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch: prompts in several chunks, and verifications that accept some drafts, none or all."""
    watched = Watched(reference, monkeypatch)
    asked = [(p, SamplingParams(max_tokens=12)) for p in [*prompts(4), long_prompt(2, 90)]]
    drafted, speculation = answers(runner, asked, limits_of(runner, 3))
    assert tokens(drafted) == [greedy(checkpoint, p, 12) for p, _ in asked]
    assert speculation is not None
    assert speculation.counts.proposed
    assert watched.drafts > 60
    assert set(watched.bases) == {0}


def test_sampled_answers_are_the_same(runner: ModelRunner) -> None:
    asked = sampled(24)
    plain, _ = answers(runner, asked, None)
    drafted, speculation = answers(runner, asked, limits_of(runner))
    assert tokens(drafted) == tokens(plain)
    assert speculation is not None
    assert speculation.counts.proposed > 100


@pytest.mark.parametrize("shards", [1, 3])
def test_a_head_that_agrees_with_its_model_has_its_drafts_accepted(tmp_path: Path, shards: int) -> None:
    path = with_head(tmp_path, "Glm4Moe", agrees=True, shards=shards)
    runner = with_mtp(path)
    asked = [(p, SamplingParams(max_tokens=24)) for p in prompts(6)]
    drafted, speculation = answers(runner, asked, limits_of(runner))
    assert tokens(drafted) == [greedy(path, p, 24) for p, _ in asked]
    assert speculation is not None
    counts = speculation.counts
    assert counts.accepted > 60
    assert counts.accepted > 0.95 * counts.proposed, "but for those that the end of an answer cut"
    asked = sampled(16)
    plain, _ = answers(runner, asked, None)
    drafted, _ = answers(runner, asked, limits_of(runner), launcher=InThread(runner))
    assert tokens(drafted) == tokens(plain)


def test_a_head_that_is_kept_in_fewer_bits(tmp_path: Path) -> None:
    """As DeepSeek-V3 is published: it drafts as the one whose weights come out."""
    section, how = METHODS["fp8"]
    paths = pack(with_head(tmp_path / "model", "DeepseekV3"), tmp_path, section, how)
    said: list[list[list[int]]] = []
    for path in paths:
        runner = with_mtp(path)
        found: list[list[int]] = []
        draft = HeadDrafter.draft

        def noted(drafter: HeadDrafter, items: Any, found: list[list[int]] = found, draft: Any = draft) -> Any:
            after, passes = draft(drafter, items)
            found += [list(item.drafts) for item in after if item.drafts]
            return after, passes

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(HeadDrafter, "draft", noted)
            answers(runner, [(p, SamplingParams(max_tokens=8)) for p in prompts(2)], limits_of(runner, 2))
        said.append(found)
    assert said[0] == said[1]
    assert len(said[0]) > 4


# Where it has not seen the beginning.


def test_behind_a_prefix_hit_it_begins_there(
    checkpoint: Path, runner: ModelRunner, reference: PlainHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(reference, monkeypatch)
    text = long_prompt(1)
    b = Bench(runner)
    for round_, count in enumerate((2, 12)):
        assert b.core.add(SequenceSpec(round_, text, SamplingParams(max_tokens=count)), 0.0) is None
        b.run()
        assert b.answers[round_] == greedy(checkpoint, text, count)
    assert set(watched.bases) == {56}, "whole blocks of a prompt of 60 tokens"


def test_it_catches_up_over_several_steps(
    checkpoint: Path, runner: ModelRunner, reference: PlainHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.draft_plans.CATCH_UP_TOKENS", 16)
    watched = Watched(reference, monkeypatch)
    text = long_prompt(7)
    b = Bench(runner)
    assert b.core.add(SequenceSpec(1, text, SamplingParams(max_tokens=16)), 0.0) is None
    b.run()
    assert b.answers[1] == greedy(checkpoint, text, 16)
    assert watched.drafts > 4


def test_preempted_sequences(checkpoint: Path, runner: ModelRunner) -> None:
    b = Bench(runner, blocks=12)
    texts = [long_prompt(n, 20) for n in range(4)]
    for n, text in enumerate(texts):
        assert b.core.add(SequenceSpec(n, text, SamplingParams(max_tokens=30)), 0.0) is None
    b.run()
    assert b.core.load().preemptions_total > 0
    assert [b.answers[n] for n in range(4)] == [greedy(checkpoint, text, 30) for text in texts]


@pytest.mark.parametrize("drafts", ["decode", "prefill"])
def test_one_sided_speculation(
    checkpoint: Path, runner: ModelRunner, reference: PlainHead, drafts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt computed on one worker, its answer on the other: hidden states and the head's KV never move."""
    watched = Watched(reference, monkeypatch)
    plain = made(checkpoint)
    assert plain.facts.identity == runner.facts.identity
    assert plain.facts.groups == runner.facts.groups
    assert len(runner.memory().areas) == 1
    first, second = (plain, runner) if drafts == "decode" else (runner, plain)
    prefill, decode = Bench(first, speculates=first is runner), Bench(second, speculates=second is runner)
    text = long_prompt(5)
    spec = SequenceSpec(1, text, SamplingParams(max_tokens=20), hand_over=True, retain=True)
    assert prefill.core.add(spec, 0.0) is None
    while prefill.step():
        pass
    assert decode.core.add(SequenceSpec(1, text, SamplingParams(max_tokens=20), hold=True), 0.0) is None
    room = decode.core.reserve(1, len(text), 0.0)
    assert room is not None
    blocks = prefill.core.block_table(1)[: len(room.block_ids)]
    for source, target in zip(parts(first.kv), parts(second.kv), strict=True):
        target[list(room.block_ids)] = source[list(blocks)]
    decode.core.adopt(1, len(text), prefill.answers[1], 0.0)
    decode.run()
    assert prefill.answers[1] + decode.answers[1] == greedy(checkpoint, text, 20)
    assert set(watched.bases) == ({len(text)} if drafts == "decode" else set())


def test_a_migrated_sequence_is_drafted_for_again(
    checkpoint: Path, runner: ModelRunner, reference: PlainHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It moves in the middle of its answer: the head begins again with what is computed where it goes on."""
    watched = Watched(reference, monkeypatch)
    text = long_prompt(6, 20)
    here, there = Bench(runner, 32), Bench(runner, 32)
    assert here.core.add(SequenceSpec(1, text, SamplingParams(max_tokens=24)), 0.0) is None
    while len(here.answers.get(1, ())) < 8:
        here.step()
    assert here.core.serve(1) is not None
    here.step()
    here.core.freeze(1)
    stands = len(text) + len(here.answers[1]) - 1
    assert there.core.add(SequenceSpec(1, text, SamplingParams(max_tokens=24), hold=True), 0.0) is None
    room = there.core.reserve(1, stands, 0.0)
    assert room is not None
    blocks = list(here.core.block_table(1)[: len(room.block_ids)])
    for pool in parts(runner.kv):
        pool[list(room.block_ids)] = pool[blocks].clone()
    there.core.adopt(1, stands, here.answers[1], 0.0)
    there.run()
    assert here.answers[1] + there.answers[1] == greedy(checkpoint, text, 24)
    assert set(watched.bases) == {0, stands}


# What others have got wrong: no answer changes, but drafts do.


def _states_of_others(self: HeadDrafter, items: Any) -> None:
    """Nothing is kept: a draft is made of whatever lies there."""
    self._states.take()


def _chained_by_nothing(self: HeadDrafter, rows: Any, *rest: Any) -> Any:
    logits, states = _RUN(self, rows, *rest)
    return logits, None if states is None else torch.zeros_like(states)


_RUN = HeadDrafter._run
PLANTED: dict[str, tuple[Any, str, Any]] = {
    "its own state is not chained": (HeadDrafter, "_run", _chained_by_nothing),
    "the model's states are not kept": (HeadDrafter, "keep", _states_of_others),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_mistakes_are_found_by_the_reference(
    runner: ModelRunner, reference: PlainHead, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*PLANTED[bug])
    Watched(reference, monkeypatch)
    asked = [(p, SamplingParams(max_tokens=12)) for p in prompts(3)]
    with pytest.raises(AssertionError):
        answers(runner, asked, limits_of(runner, 3))


def test_a_head_that_fails_ends_no_answer(
    checkpoint: Path, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    head = runner._draft
    assert isinstance(head, HeadDrafter)

    def fails(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    text = long_prompt(12)
    b = Bench(runner)
    assert b.core.add(SequenceSpec(1, text, SamplingParams(max_tokens=16)), 0.0) is None
    for _ in range(3):
        b.step()
    with monkeypatch.context() as patched:
        patched.setattr(head, "_pass", fails)
        b.step()
    b.run()
    assert b.answers[1] == greedy(checkpoint, text, 16)
    assert caplog.text.count("goes on without drafts") == 1


# What it refuses.


def refused(path: Path, words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        ModelRunner(EngineConfig.model_validate({"model": str(path), "speculation": MTP, "num_blocks": 16}))


def test_a_checkpoint_without_a_head(tmp_path: Path) -> None:
    refused(saved(tmp_path, "Glm4Moe", **FAMILIES["Glm4Moe"]), r"has no prediction head \(model\.layers\.2\.eh_proj")


def test_another_family(tmp_path: Path) -> None:
    refused(saved(tmp_path, "Llama"), "of the family llama, whose prediction heads are not known")


def test_it_is_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runner.load_model", lambda *_: pytest.fail("read"))
    test_a_checkpoint_without_a_head(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_hidden_layers": None},
            "has num_hidden_layers None, and a whole number is expected.*; correct it, or set",
        ),
        ({"num_hidden_layers": "2"}, "has num_hidden_layers 2, and a whole number"),
        ({"num_nextn_predict_layers": 2_000_000_000}, "has no prediction head"),
    ],
)
def test_a_head_that_cannot_be_found_is_refused_in_one_sentence(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"model.norm.weight": ("F32", (64,))})
    described = {"model_type": "glm4_moe", "num_hidden_layers": 2} | changes
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ModelLoadError, match=words):
        check_head(EngineConfig.model_validate({"model": str(tmp_path), "speculation": MTP}))


def test_what_is_wrong_with_the_model_itself_is_said_by_its_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig.model_validate({"model": str(tmp_path), "speculation": MTP})
    check_head(config)  # an empty directory
    check_head(EngineConfig.model_validate({"model": str(tmp_path / "none"), "speculation": MTP}))
    described = {"model_type": "glm4_moe", "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(described))
    check_head(config)
    monkeypatch.setattr("engine.prediction_head.read_weights", lambda _: 1 // 0)
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        check_head(config)


def test_half_a_head(tmp_path: Path) -> None:
    refused(with_head(tmp_path, "Glm4Moe", drop="hnorm.weight"), r"lacks weights of the model: .*hnorm\.weight")


def test_settings_that_it_does_not_go_with() -> None:
    for other in ({"tensor_parallel": 2}, {"adapters": {"models": {"a": "/a"}}}):
        with pytest.raises(ValueError, match="not offered"):
            EngineConfig.model_validate({"speculation": MTP} | other)
    with pytest.raises(ValueError, match="the method is mtp"):
        EngineConfig.model_validate({"speculation": MTP | {"model": "/small"}})


def test_its_memory_is_counted(checkpoint: Path, runner: ModelRunner) -> None:
    head = runner._draft
    assert isinstance(head, DraftModel)
    own = head.block_bytes
    assert own > BLOCK * 64 * 4, "a hidden state for each token"
    assert head.beside(runner.facts.groups) == (own,)
    assert "its prediction head (native paged" in runner.describe_path() or "gather" in runner.describe_path()


def test_the_items_of_a_plan_are_untouched(runner: ModelRunner) -> None:
    """Without places for drafts nothing is asked of the head."""
    item = PlanItem(1, [7], 2, [0, 1], True, 1, SamplingParams(), 2, [5, 6, 7])
    head = runner._draft
    assert head is not None
    assert head.draft([item]) == ([item], ())
