"""The trial at start in bfloat16: it refuses no right model, however sharply its attention decides, and sees one layer
of it that is a tenth off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import position_trial
from engine import runner as runner_module
from engine.config import EngineConfig
from engine.position_trial import disagreement
from engine.runner import ModelRunner
from tests.model.test_bfloat16_families import rounded_family
from tests.support.courses import BLOCK, BLOCKS
from tests.support.families import PEOPLE_SERVE
from tests.support.tiers import tiered

# How many times larger queries are than the family's own beginning makes them.
SIZES = (0.5, 1, 2, 4)
QUICK = [("gemma4_text", 2), ("qwen3_next", 1), ("gpt_oss", 4)]


class Tried:
    """What the last path that a runner tried was tried with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.last: tuple[Any, ...] = ()

        def trial(*given: Any) -> str:
            self.last = given
            return disagreement(*given)

        monkeypatch.setattr(runner_module, "disagreement", trial)


def a_tenth_more(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> Any:
    """Of what a layer adds."""
    before = args[0] if args else kwargs["hidden_states"]
    after, *rest = answer if isinstance(answer, tuple) else (answer,)
    more = before + 1.1 * (after - before)
    return (more, *rest) if isinstance(answer, tuple) else more


@pytest.mark.parametrize(
    ("family", "times"), tiered(QUICK, [(f, t) for f in PEOPLE_SERVE for t in SIZES if (f, t) not in QUICK])
)
def test_what_is_right_is_served_and_a_layer_that_is_a_tenth_off_is_not(
    family: str, times: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    path = rounded_family(tmp_path, family, times)
    tried = Tried(monkeypatch)
    settings = {"dtype": "bfloat16", "num_blocks": BLOCKS, "block_tokens": BLOCK, "threads": 1, "kernels": "auto"}
    runner = ModelRunner(EngineConfig.model_validate({"model": str(path), **settings}))  # raises where it is refused
    assert "torch gather" not in runner.forward.name or torch.cuda.is_available()
    if not tried.last:  # a native stack: tests/model/test_position_trial.py
        return
    forward, reference, shape, device = tried.last
    layers = [m for m in forward.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert layers
    for number, layer in enumerate(layers):
        planted = layer.register_forward_hook(a_tenth_more, with_kwargs=True)
        assert f"layer {number} is off" in disagreement(forward, reference, shape, device)
        planted.remove()


def test_where_rounding_is_not_known_much_is_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(_: Any) -> Any:
        raise position_trial.NoReference("it does not run")

    monkeypatch.setattr(position_trial, "in_float32", fails)
    tried = Tried(monkeypatch)
    path = rounded_family(tmp_path, "gemma2", 1)
    ModelRunner(EngineConfig(model=str(path), dtype="bfloat16", num_blocks=BLOCKS, block_tokens=BLOCK, threads=1))
    assert tried.last[1].excerpts[0].rounding == {}
