"""`diptych up` checks the model in a process of its own before it deploys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.config import ClusterConfig
from deploy.model_check import ModelCheckError, check_files, checking
from tests.support.checkpoints import saved_model, saved_tokenizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    saved_tokenizer(saved_model(tmp_path))
    return tmp_path


def checked(path: Path, **settings: Any) -> None:
    config = ClusterConfig.model_validate({"model": str(path), **settings})
    check_files(config)
    with checking(config) as check:
        check.wait()
        check.look()  # a second look says the same


def test_a_good_model_passes(path: Path) -> None:
    checked(path)


@pytest.mark.long
def test_what_only_one_pool_cannot_serve_is_found(path: Path) -> None:
    with pytest.raises(ModelCheckError, match="the model's limit is 256; set it to at most 256"):
        checked(path, decode={"engine": {"context_limit_tokens": 512}})


def test_shapes_are_compared_without_reading_weights(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 47}))
    with pytest.raises(ModelCheckError, match=r"the shape \[32, 48\] where config.json asks for \[32, 47\] and 5"):
        checked(path)


@pytest.mark.long
def test_the_tokenizer_is_checked_too(path: Path) -> None:
    (path / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelCheckError, match="holds a JSON list"):
        checked(path)
