"""The tokenizer that is loaded without torch is the one that AutoTokenizer loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoint.tokenizer import is_plain, load_tokenizer

CHAT = [{"role": "user", "content": "Why is the sky blue? <|im_end|>"}, {"role": "assistant", "content": "Ü 😀"}]


def changed(model_path: Path, directory: Path, file: str, **fields: Any) -> Path:
    """The model's directory without its weights, and with other fields in one file; None takes a field out."""
    shutil.copytree(model_path, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((directory / file).read_text()) | fields
    (directory / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return directory


@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_it_is_the_one_that_transformers_chooses(tmp_path: Path, model_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    path = changed(model_path, tmp_path / "model", "tokenizer_config.json", tokenizer_class=name)
    assert is_plain(path)
    ours, theirs = load_tokenizer(str(path)), AutoTokenizer.from_pretrained(path)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    assert ours.apply_chat_template(CHAT, tokenize=False) == theirs.apply_chat_template(CHAT, tokenize=False)
    assert len(ours) == len(theirs)


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": None}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Slow", "code.Fast"]}}),
        ("config.json", {"model_type": "mistral"}),
    ],
)
def test_the_choice_is_left_to_transformers_where_it_may_be_another(
    tmp_path: Path, model_path: Path, file: str, fields: dict[str, Any]
) -> None:
    assert not is_plain(changed(model_path, tmp_path / "model", file, **fields))


def test_a_directory_without_its_files_is_left_to_transformers(tmp_path: Path, model_path: Path) -> None:
    assert not is_plain(tmp_path)
    shutil.copy(model_path / "tokenizer.json", tmp_path)
    assert not is_plain(tmp_path)
    assert not is_plain(Path("owner/name-of-a-model"))


def test_a_router_never_imports_torch(model_path: Path) -> None:
    code = f"""
import sys
import router.server
from router.text.tokenizer import Tokenizer
assert Tokenizer({str(model_path)!r}).encode("hello")
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
