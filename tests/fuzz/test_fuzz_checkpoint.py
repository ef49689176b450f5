"""A valid checkpoint with one file mangled: one sentence that names the file's place, never a traceback, never served.

Served means here: the engine's check and the router's tokenizer both accept. What a mangling leaves valid (a byte of a
weight, of a token's text) may be accepted; then the identity says that it is another model.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.files import CheckpointError
from checkpoint.generation import read_description
from checkpoint.tokenizer import load_tokenizer
from engine.model_check import ModelLoadError, check_model
from settings.model_path import ModelPathError
from tests.support.checkpoints import LFS_POINTER, saved_model, saved_tokenizer

LONG = os.environ.get("FUZZ") == "long"
FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    "chat_template.jinja",
)

Mangle = Callable[[bytes], bytes]
ALWAYS_REFUSED: dict[str, Mangle] = {
    "empty": lambda content: b"",
    "a pointer": lambda content: LFS_POINTER,
    "half": lambda content: content[: len(content) // 2],
    "all but its end": lambda content: content[:-3],
    "noise": lambda content: random.Random(1).randbytes(len(content)),
    "zeros": lambda content: bytes(len(content)),
    "a web page": lambda content: b"<!DOCTYPE html><html><body>404: Not Found</body></html>",
    "a list": lambda content: b"[]",
    "null": lambda content: b"null",
}
# An empty chat template is none, and text of any kind is a template.
TEMPLATE_MAY_BE = {"empty", "a web page", "a list", "null", "zeros", "all but its end"}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = saved_model(tmp_path_factory.mktemp("valid"))
    saved_tokenizer(path)
    assert {p.name for p in path.iterdir()} >= set(FILES)
    assert refusal(path) is None
    return path


def refusal(path: Path) -> str | None:
    """The sentence, or None where all of it is accepted."""
    try:
        check_model(str(path), "auto", None)
        load_tokenizer(str(path))
        read_description(path)
    except (ModelLoadError, CheckpointError, ModelPathError) as error:
        said = str(error)
        assert said, "a refusal without words"
        assert "\n" not in said, said
        assert len(said) < 1500, said
        assert "; " in said, f"no fix: {said}"
        return said
    return None


def copied(valid: Path, to: Path) -> Path:
    shutil.copytree(valid, to)
    return to


@pytest.mark.parametrize("how", ALWAYS_REFUSED)
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_not_what_it_was_is_refused(valid: Path, tmp_path: Path, file: str, how: str) -> None:
    path = copied(valid, tmp_path / "model")
    (path / file).write_bytes(ALWAYS_REFUSED[how]((valid / file).read_bytes()))
    said = refusal(path)
    if file == "chat_template.jinja" and how in TEMPLATE_MAY_BE:
        return
    assert said is not None
    assert str(path) in said


@pytest.mark.parametrize("file", FILES)
def test_a_place_without_a_file(valid: Path, tmp_path: Path, file: str) -> None:
    for number, what in enumerate(("link", "directory")):
        path = copied(valid, tmp_path / f"model{number}")
        (path / file).unlink()
        if what == "link":
            (path / file).symlink_to(path / "gone")
        else:
            (path / file).mkdir()
        assert refusal(path) is not None or (file == "chat_template.jinja" and what == "directory"), what


@pytest.mark.parametrize("seed", range(400 if LONG else 12))
def test_bytes_changed_at_random_never_raise_anything_else(valid: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = copied(valid, tmp_path / "model")
    file = path / rng.choice(FILES)
    content = bytearray(file.read_bytes())
    at = rng.randrange(min(len(content), 4000))
    kind = rng.choice(("flip", "cut out", "repeat", "digits"))
    if kind == "flip":
        for _ in range(rng.choice((1, 4, 64))):
            content[rng.randrange(min(len(content), 4000))] = rng.randrange(256)
    elif kind == "cut out":
        del content[at : at + rng.choice((1, 10, 1000))]
    elif kind == "repeat":
        content[at:at] = content[at : at + rng.choice((1, 10, 100))]
    else:
        digits = [i for i in range(min(len(content), 4000)) if chr(content[i]).isdigit()]
        for i in rng.sample(digits, min(3, len(digits))):
            content[i] = rng.choice(b"0123456789-")
    file.write_bytes(bytes(content))
    refusal(path)  # asserts that it is a sentence


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 0, 1.5, True, 10**30, [1, 2], {"a": 1}])
def test_every_setting_of_another_type(valid: Path, tmp_path: Path, value: object) -> None:
    import json

    config = json.loads((valid / "config.json").read_text())
    path = copied(valid, tmp_path / "model")
    names = sorted(config) if LONG else random.Random(str(value)).sample(sorted(config), 8)
    for name in names:
        (path / "config.json").write_text(json.dumps(config | {name: value}))
        refusal(path)
