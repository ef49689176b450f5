"""State that a tokenizer's files keep never reaches a prompt: encoding is what transformers computes, always."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.files import CheckpointError
from checkpoint.tokenizer import load_tokenizer
from engine.grammar import GrammarCompiler
from router.text.tokenizer import Tokenizer
from tests.support.checkpoints import SIZE, saved_tokenizer

TEXTS = ("Why is the sky blue and not green or red, tell me please?", "hi", "<s>a</s> 東京", "")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZE}))
    saved_tokenizer(tmp_path)
    return tmp_path


def edit(path: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((path / file).read_text())
    change(content)
    (path / file).write_text(json.dumps(content))


def encodes_as_transformers(path: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(str(path)), AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        assert [ours.encode(text) for _ in range(3)] == [expected] * 3, text
    chat = [{"role": "user", "content": TEXTS[0]}]
    rendered = theirs.apply_chat_template(chat, tokenize=False)
    assert (
        ours.backend.encode(rendered, add_special_tokens=False).ids
        == theirs(rendered, add_special_tokens=False).input_ids
    )


def test_truncation_and_padding_that_were_saved(path: Path) -> None:
    """What `tokenizer(..., truncation=True, padding="max_length")` before save_pretrained leaves behind."""
    from transformers import AutoTokenizer

    wrapped: Any = AutoTokenizer.from_pretrained(path)
    wrapped("x", truncation=True, max_length=8, padding="max_length")
    wrapped.save_pretrained(path)
    stated = json.loads((path / "tokenizer.json").read_text())
    assert stated["truncation"]["max_length"] == 8
    assert stated["padding"] is not None
    encodes_as_transformers(path)
    assert len(Tokenizer(str(path)).encode(TEXTS[0])) > 8


@pytest.mark.parametrize(
    "truncation", [{"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}]
)
def test_truncation_in_the_file_alone(path: Path, truncation: dict[str, Any]) -> None:
    edit(path, "tokenizer.json", lambda t: t.update(truncation=truncation))
    encodes_as_transformers(path)


def test_dropout_makes_encoding_random_and_is_off(path: Path) -> None:
    from tokenizers import Tokenizer as Raw

    edit(path, "tokenizer.json", lambda t: t["model"].update(dropout=0.9))
    raw = Raw.from_file(str(path / "tokenizer.json"))
    assert len({tuple(raw.encode(TEXTS[0]).ids) for _ in range(8)}) > 1  # what would be served otherwise
    ours = Tokenizer(str(path))
    assert len({tuple(ours.encode(TEXTS[0])) for _ in range(8)}) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"split_special_tokens": True},
        {"add_prefix_space": True},
        {"clean_up_tokenization_spaces": True},
        {"padding_side": "left", "truncation_side": "left", "model_max_length": 5},
        {"add_bos_token": True},
        {"add_eos_token": True},
    ],
)
def test_settings_beside_the_file_mean_what_they_mean_to_transformers(path: Path, settings: dict[str, Any]) -> None:
    edit(path, "tokenizer_config.json", lambda t: t.update(settings))
    encodes_as_transformers(path)


def test_a_grammar_sees_the_same_tokenizer(path: Path) -> None:
    edit(
        path,
        "tokenizer.json",
        lambda t: t.update(truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}),
    )
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    compiler = GrammarCompiler(str(path), SIZE["vocab_size"])
    compiler.prepare()
    assert sorted(compiler._tokenizer.eos_tokens) == [2, 7]
    assert len(compiler._tokenizer.tokenize_str("why is the sky blue")) > 1


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", "{}", "has no model"),
        ("tokenizer.json", "[]", "a JSON list"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "cannot be loaded"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer_config.json", "[]", "a JSON list"),
        ("tokenizer_config.json", "", "is empty"),
        ("special_tokens_map.json", '{"a', "no valid JSON"),
        ("chat_template.jinja", "{% for m in messages %}{{ m", "no valid Jinja"),
        ("chat_template.jinja", "version https://git-lfs.github.com/spec/v1\noid x", "Git LFS pointer"),
    ],
)
def test_a_damaged_tokenizer_is_named(path: Path, file: str, content: str | None, words: str) -> None:
    if content is None:
        (path / file).unlink()
    else:
        (path / file).write_text(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_templates_with_the_hubs_own_tags_are_valid(path: Path) -> None:
    template = (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ m }}{% endgeneration %}{% endfor %}"
    )
    (path / "chat_template.jinja").write_text(template)
    assert load_tokenizer(str(path)).template.texts == (template,)
