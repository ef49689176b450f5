"""What the files say of answers: end tokens, sampling, context limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint.files import CheckpointError
from checkpoint.generation import SamplingDefaults, read_description
from checkpoint.limits import context_limit


def files(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 2}, None, {2}),
        ({"eos_token_id": 2}, {}, {2}),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 7]}, {2, 7}),
        ({"text_config": {"eos_token_id": 5}}, None, {5}),
        ({}, None, set()),
    ],
)
def test_end_tokens(tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, ends: set[int]) -> None:
    assert read_description(files(tmp_path, config, generation)).end_tokens == ends


def test_the_models_own_sampling(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 2048}
    found = read_description(files(tmp_path, {}, generation)).sampling
    assert found == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, max_tokens=2048)
    assert str(found) == "temperature 0.6, top_p 0.95, top_k 20, max_tokens 2048"
    assert read_description(files(tmp_path, {}, {})).sampling == SamplingDefaults()


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("generation", "temperature", "0.6"),
        ("generation", "temperature", -1),
        ("generation", "temperature", float("nan")),
        ("generation", "top_p", 0),
        ("generation", "top_p", 2),
        ("generation", "top_k", 1.5),
        ("generation", "repetition_penalty", 0),
        ("generation", "repetition_penalty", True),
        ("generation", "max_new_tokens", 0),
        ("generation", "eos_token_id", "</s>"),
        ("generation", "eos_token_id", [[2]]),
        ("config", "eos_token_id", -1),
        ("config", "vocab_size", "many"),
        ("config", "vocab_size", 0),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(tmp_path: Path, file: str, name: str, value: Any) -> None:
    changed = {name: value}
    files(tmp_path, changed if file == "config" else {}, changed if file == "generation" else None)
    where = "/config" if file == "config" else "generation_config"
    with pytest.raises(CheckpointError, match=rf"{where}\.json has {name} "):
        read_description(tmp_path)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({}, None),
        ({"text_config": {"max_position_embeddings": 77}}, 77),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),  # as model cards have it
        ({"max_position_embeddings": 40960, "rope_parameters": YARN}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": YARN}, 131072),  # as it is published
        ({"max_position_embeddings": 163840, "rope_scaling": {**YARN, "factor": 2}}, 163840),
        ({"max_position_embeddings": 4096, "rope_scaling": {**YARN, "rope_type": "linear"}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 4}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {**YARN, "factor": "4"}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {**YARN, "factor": float("inf")}}, 4096),
        ({"max_position_embeddings": "long"}, None),
        ({"max_position_embeddings": 4096, "rope_scaling": []}, 4096),
    ],
)
def test_how_long_a_context_may_be(config: dict[str, Any], limit: int | None) -> None:
    assert context_limit(config) == limit
