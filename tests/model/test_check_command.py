"""`diptych check`: yes or no for one checkpoint, with the reason or with what serves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from tests.support.checkpoints import saved_model, saved_tokenizer
from tests.support.families import saved_family


def checked(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["check", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def path(tmp_path: Path) -> Path:
    saved_tokenizer(saved_model(tmp_path / "small llama"))  # with a space
    return tmp_path / "small llama"


def test_yes_with_what_serves_it(path: Path) -> None:
    code, said, complaints = checked(str(path), "--dtype", "float32", "--device", "cpu")
    assert (code, complaints) == (0, "")
    for words in (f"{path} is served", "LlamaForCausalLM", "on cpu in float32", "256 tokens", "full: 2 layers, 1 x 16"):
        assert words in said
    assert "256 bytes a token" in said  # 2 layers, keys and values, 16 numbers of 4 bytes


def test_for_programs(path: Path) -> None:
    code, said, _ = checked(str(path), "--json", "--context-limit", "64", "--device", "cpu")
    found: dict[str, Any] = json.loads(said)
    assert code == 0
    assert found["served"]
    assert found["context_limit_tokens"] == 64
    assert found["original_context_tokens"] == 0
    assert [group["rule"] for group in found["groups"]] == ["full"]


def test_states_are_counted_by_sequence(tmp_path: Path) -> None:
    saved_tokenizer(saved_family(tmp_path, "lfm2", {"vocab_size": 300, "layer_types": ["conv", "full_attention"]}))
    found = json.loads(checked(str(tmp_path), "--json", "--dtype", "float32", "--device", "cpu")[1])
    assert [group["rule"] for group in found["groups"]] == ["full", "state"]
    assert found["bytes_per_sequence"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context-limit", "512"], "the model's limit is 256; set it to at most 256"),
        (["--dtype", "float3"], "--dtype is 'float3'"),
    ],
)
def test_no_with_the_reason(path: Path, arguments: list[str], words: str) -> None:
    code, said, complaints = checked(str(path), *arguments)
    assert code == 1
    assert said == ""
    assert words in complaints.replace("\n", " ")


def test_no_for_programs(path: Path) -> None:
    (path / "tokenizer.json").write_text("[]")
    code, said, _ = checked(str(path), "--json", "--device", "cpu")
    found = json.loads(said)
    assert code == 1
    assert not found["served"]
    assert "tokenizer.json holds a JSON list" in found["reason"]


def test_without_a_chat_template_chat_is_refused(path: Path) -> None:
    for name in ("chat_template.jinja", "chat_template.json"):
        (path / name).unlink(missing_ok=True)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    code, said, _ = checked(str(path), "--device", "cpu")
    assert code == 0
    assert "chat is refused; add chat_template.jinja" in said


def test_what_a_window_keeps_is_counted_by_sequence(tmp_path: Path) -> None:
    saved_tokenizer(saved_model(tmp_path, "Mistral", sliding_window=40, head_dim=16))
    found = json.loads(checked(str(tmp_path), "--json", "--dtype", "float32", "--device", "cpu")[1])
    assert found["bytes_per_token"] == 0
    assert found["bytes_per_sequence"] == 40 * 2 * 2 * 1 * 16 * 4  # tokens, layers, keys and values, heads, elements
