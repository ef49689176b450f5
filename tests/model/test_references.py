"""What tests hold engines against."""

from __future__ import annotations

from pathlib import Path

from tests.support.checkpoints import saved_model
from tests.support.prompts import reference_greedy


def test_a_reference_is_of_the_model_that_is_at_a_path_now(tmp_path: Path) -> None:
    """One that was there before has answered for the next one."""
    answers = []
    for layers in (1, 3):
        model = saved_model(tmp_path, num_hidden_layers=layers)
        answers.append(reference_greedy(str(model), [5, 6, 7], 8))
    assert answers[0] != answers[1]
