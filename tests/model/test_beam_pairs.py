"""Beam search beside what else an engine may have: adapters, a draft model, a prediction head. Answers stay exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.beams import BeamAnswer, BeamParams
from engine.types import SamplingParams, SequenceSpec
from tests.model import test_adapters, test_draft_model, test_prediction_head
from tests.model.test_beams import ENDS, check, wanted
from tests.model.test_families import greedy, saved
from tests.support.adapters import merged_model, plain_model, saved_adapter

BEAMS = BeamParams(3, 2, 0.8)
TOKENS = 10
SEARCHED = SamplingParams(max_tokens=TOKENS, stop_token_ids=frozenset(ENDS))
PROMPTS = test_draft_model.long_prompt(1, 13), test_draft_model.long_prompt(2, 24)


def run(core: Any, runner: Any) -> tuple[dict[int, tuple[BeamAnswer, ...]], dict[int, list[int]]]:
    """Answers that were searched for, and others."""
    found: dict[int, tuple[BeamAnswer, ...]] = {}
    others: dict[int, list[int]] = {}
    while (plan := core.schedule(0.0)) is not None:
        events = core.commit(plan, runner.execute(plan), 0.0)
        assert not [end for end in events.ends if end.error]
        found |= dict(events.beams)
        for token in events.tokens:
            others.setdefault(token.sequence_id, []).append(token.token_id)
        core.check()
    assert core.is_idle()
    assert core.pool.is_idle()
    return found, others


def test_with_adapters(tmp_path: Path) -> None:
    """More adapters than slots: the searches of the third wait for one."""
    path = saved(tmp_path / "model", "Llama")
    adapters = {f"a{i}": saved_adapter(path, tmp_path / f"a{i}", 20 + i) for i in range(3)}
    engine = test_adapters.Engine(test_adapters.runner_of(path, adapters))
    asked = [(prompt, name) for name in ("", *adapters) for prompt in PROMPTS]
    for number, (prompt, name) in enumerate(asked):
        spec = SequenceSpec(number, prompt, SEARCHED, adapter=engine.digest(name), beams=BEAMS)
        assert engine.core.add(spec, 0.0) is None
    engine.ask(99, PROMPTS[0], "a1")
    found, others = run(engine.core, engine.runner)
    models = {name: merged_model(path, at) for name, at in adapters.items()} | {"": plain_model(path)}
    for number, (prompt, name) in enumerate(asked):
        check(found[number], wanted(models[name], tuple(prompt), BEAMS, TOKENS))
    assert others == {99: test_adapters.greedy(models["a1"], PROMPTS[0])}
    assert len({one[0].token_ids for one in found.values()}) > 5, "adapters change answers"
    assert not any(engine.adapters.users(adapter.digest) for adapter in engine.runner.adapters)


@pytest.mark.parametrize("drafts", ["draft", "mtp"])
def test_with_drafts_for_others(tmp_path: Path, drafts: str) -> None:
    if drafts == "draft":
        path = saved(tmp_path / "model", "Llama")
        runner = test_draft_model.drafted_by(path, path)
    else:
        path = test_prediction_head.with_head(tmp_path / "model", "Glm4Moe")
        runner = test_prediction_head.with_mtp(path)
    bench = test_draft_model.Bench(runner)
    for number, prompt in enumerate(PROMPTS):
        assert bench.core.add(SequenceSpec(number, prompt, SEARCHED, beams=BEAMS), 0.0) is None
        other = SequenceSpec(10 + number, prompt[:9], SamplingParams(max_tokens=TOKENS))
        assert bench.core.add(other, 0.0) is None
    found, others = run(bench.core, runner)
    model = plain_model(path)
    for number, prompt in enumerate(PROMPTS):
        check(found[number], wanted(model, tuple(prompt), BEAMS, TOKENS))
        assert others[10 + number] == greedy(path, prompt[:9], TOKENS)
    assert bench.core.speculation is not None
    assert bench.core.speculation.counts.proposed, "beside the beams"
