"""Which tensors of a checkpoint are a prediction head's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from checkpoint.prediction_heads import head_prefix, heads_of, without_heads

NAMES = [
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.2.eh_proj.weight",
    "model.layers.3.eh_proj.weight",
    "model.layers.20.mlp.up_proj.weight",
    "model.norm.weight",
]


def config(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"model_type": "glm4_moe", "num_hidden_layers": 2, "num_mtp_layers": 1} | changes))


def test_a_head_is_the_layer_behind_the_last() -> None:
    assert head_prefix(config()) == "model.layers.2."
    assert without_heads(config(), NAMES) == [NAMES[0], *NAMES[2:]]
    assert without_heads(config(num_mtp_layers=2), NAMES) == [NAMES[0], *NAMES[3:]]


def test_heads_are_those_that_are_there_however_many_are_said() -> None:
    assert without_heads(config(num_mtp_layers=2_000_000_000), iter(NAMES)) == [NAMES[0], *NAMES[3:]]


def test_a_layer_without_the_projection_of_a_head_is_none() -> None:
    other = ["model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.layers.1.eh_proj.weight"]
    assert without_heads(config(), other) == other
    assert without_heads(config(), [*other, "model.layers.2.eh_proj.weight"]) == other[1:]


@pytest.mark.parametrize(
    "changes", [{"model_type": "llama"}, {"num_mtp_layers": 0}, {"num_mtp_layers": None}, {"num_mtp_layers": "1"}]
)
def test_nothing_is_left_out_where_no_head_is_known(changes: dict[str, Any]) -> None:
    assert heads_of(config(**changes)) == 0
    assert without_heads(config(**changes), NAMES) == NAMES
