"""A model that is read says how far it is, by transformers' own count of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import load_progress
from engine.model_loader import load_model
from settings.phases import SERVES, phase, tell_phases_to
from tests.support.checkpoints import saved_model


@pytest.fixture
def heard() -> Iterator[list[str]]:
    said: list[str] = []
    tell_phases_to(said.append)
    yield said
    phase(SERVES)
    tell_phases_to(None)


def test_how_far_the_weights_are_read(tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = saved_model(tmp_path)
    phase("loading the model")
    load_model(str(directory), "float32", torch.device("cpu"), None)
    assert heard == ["loading the model", "trying the model"], "it took no five seconds"

    monkeypatch.setattr(load_progress, "_EVERY_S", 0.0)
    heard.clear()
    phase("loading the model")
    load_model(str(directory), "float32", torch.device("cpu"), None)
    first, *told, last = heard
    assert (first, last) == ("loading the model", "trying the model")
    shares = [int(one.removeprefix("loading the model (").removesuffix(" %)")) for one in told]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert 50 < shares[-1] < 100
