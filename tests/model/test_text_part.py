"""Checkpoints that see or hear besides reading: their text is served, exactly, and nothing else of them is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.model_check import ModelLoadError, check_model
from engine.runner import ModelRunner
from tests.support.courses import BLOCK, BLOCKS, differences, run_course
from tests.support.families import tiny_config
from tests.support.tiers import tiered

Tensors = dict[str, torch.Tensor]
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
# Models with a model for the text alone; models that only run whole.
ALONE = ("gemma3", "mistral3", "llama4", "qwen3_5", "gemma4", "llava", "idefics3", "internvl", "aya_vision")
WHOLE = {"qwen2_5_vl": {"text_config": MROPE}, "qwen3_vl": {"text_config": MROPE}}


def saved(directory: Path, model_type: str, changes: dict[str, Any]) -> Path:
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(3)
    config = tiny_config(model_type, changes)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def rewrite(path: Path, how: Callable[[Tensors], Tensors]) -> Path:
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    changed = {name: tensor.contiguous() for name, tensor in how(load_file(file)).items()}
    file.unlink()
    save_file(changed, file, metadata={"format": "pt"})
    return path


def runner(path: Path) -> ModelRunner:
    return ModelRunner(EngineConfig(model=str(path), dtype="float32", num_blocks=BLOCKS, block_tokens=BLOCK, threads=1))


def assert_exact(path: Path) -> ModelRunner:
    from transformers import AutoModelForImageTextToText

    made = runner(path)
    whole = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    assert differences(run_course(made), whole) == []
    return made


@pytest.mark.parametrize("model_type", tiered(ALONE[:4], ALONE[4:]))
def test_text_is_served_by_the_text_model(tmp_path: Path, model_type: str) -> None:
    path = saved(tmp_path, model_type, {})
    assert_exact(path)
    checked = check_model(str(path), "float32", None)
    assert checked.model_class.__name__.endswith("ForCausalLM")
    assert not any("vision" in name or "visual" in name for name in checked.names)


def test_a_text_model_that_is_listed_among_those_that_see_is_served(tmp_path: Path) -> None:
    assert_exact(saved(tmp_path, "mistral4", {}))


@pytest.mark.parametrize("model_type", tiered(["qwen3_vl"], ["qwen2_5_vl"]))
def test_a_model_without_a_text_model_runs_whole_and_drops_its_sight(tmp_path: Path, model_type: str) -> None:
    made: Any = assert_exact(saved(tmp_path, model_type, WHOLE[model_type])).forward
    assert not [name for name, _ in made.model.named_parameters() if "visual" in name]


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_names_of_either_time(tmp_path: Path, prefix: str) -> None:
    """Before transformers' fifth version and since."""

    def renamed(tensors: Tensors) -> Tensors:
        return {name.replace("language_model.model.", prefix): tensor for name, tensor in tensors.items()}

    assert_exact(rewrite(saved(tmp_path, "mistral3", {}), renamed))


def test_a_head_of_its_own_is_used(tmp_path: Path) -> None:
    head = torch.randn(128, 64, generator=torch.Generator().manual_seed(5)) / 8
    path = rewrite(saved(tmp_path, "mistral3", {}), lambda w: w | {"language_model.lm_head.weight": head})
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(config))
    assert_exact(path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda w: w | {"language_model.model.extra.weight": torch.ones(3)}, "no place for: model.extra.weight"),
        (lambda w: w | {"another_tower.weight": torch.ones(3)}, "no place for: another_tower.weight"),
        (lambda w: {n: t for n, t in w.items() if not n.endswith("layers.1.mlp.up_proj.weight")}, "lacks weights"),
        (
            lambda w: w | {"model.norm.weight": torch.ones(64)},
            "holds model.norm.weight under a second name|one tensor of the model|under a second name",
        ),
    ],
)
def test_what_is_left_over_is_refused_as_ever(tmp_path: Path, how: Callable[[Tensors], Tensors], words: str) -> None:
    path = rewrite(saved(tmp_path, "mistral3", {}), how)
    with pytest.raises(ModelLoadError, match=words):
        check_model(str(path), "float32", None)


def test_a_text_checkpoint_has_no_tower_to_leave_out(tmp_path: Path) -> None:
    from tests.support.checkpoints import saved_model

    path = rewrite(saved_model(tmp_path), lambda w: w | {"vision_tower.weight": torch.ones(3)})
    with pytest.raises(ModelLoadError, match=r"no place for: vision_tower\.weight"):
        check_model(str(path), "float32", None)
