from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.files import CheckpointError, check_directory, first_line, read_object, read_optional
from tests.support.checkpoints import LFS_POINTER


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (LFS_POINTER, "Git LFS pointer"),
        (b'{"a": 1', "no valid JSON .* perhaps cut short"),
        (b"[]", "a JSON list where an object is expected"),
        (b"null", "a JSON null"),
        (b'"text"', "a JSON string"),
        (b"true", "a JSON boolean"),
        (b"3", "a JSON number"),
        (b"\xff\xfe{}", "no text in UTF-8"),
        (b"[" * 100_000, "no sensible JSON|no valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no sensible JSON"),
    ],
)
def test_what_is_no_object_is_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_object(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_absent_and_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert read_optional(path) == {}
    with pytest.raises(CheckpointError, match="is missing"):
        read_object(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": [1]}')  # an editor's byte order mark
    assert read_optional(path) == {"a": [1]}
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="a link to a file that is not there"):
        read_optional(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_optional(path)


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.model", "chat_template.jinja", "some.safetensors"])
def test_pointers_of_every_kind_of_file_are_found(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LFS_POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer"):
        check_directory(tmp_path)


def test_the_first_line_of_what_a_library_says() -> None:
    assert first_line(ValueError("\n  bad thing:\n  details")) == "bad thing"
    assert first_line(KeyError()) == "KeyError"
