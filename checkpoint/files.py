"""JSON files and stand-ins: the kinds of damage that downloads, clones and copies leave behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_LFS = b"version https://git-lfs.github.com/spec/"
_MAX_JSON_BYTES = 256 << 20
_READ = (".json", ".jinja", ".safetensors", ".model", ".txt")  # what anything here may read from a checkpoint
_FETCH = "download or copy it again"


class CheckpointError(Exception):
    """One sentence: the file, what is wrong with it, and what to do."""


def read_bytes(path: Path, limit: int = _MAX_JSON_BYTES) -> bytes:
    """Raises CheckpointError for what cannot be read, is empty, too large, or a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(content) > limit:
        raise CheckpointError(f"{path} is longer than {limit >> 20} MiB, so it is not what its name says; {_FETCH}")
    if not content.strip():
        raise CheckpointError(f"{path} is empty; {_FETCH}")
    _check_pointer(path, content)
    return content


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object. Raises CheckpointError."""
    content = read_bytes(path)
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is no text in UTF-8; {_FETCH}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is no valid JSON ({first_line(error)}), perhaps cut short; {_FETCH}") from None
    except (RecursionError, ValueError) as error:  # nested without end; an integer of thousands of digits
        raise CheckpointError(f"{path} is no sensible JSON ({first_line(error)}); {_FETCH}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {_kind(value)} where an object is expected; {_FETCH}")
    return value


def read_optional(path: Path) -> dict[str, Any]:
    """As read_object; empty where there is no such file. A broken link is not an absent file."""
    return read_object(path) if os.path.lexists(path) else {}


def check_directory(directory: Path) -> None:
    """No file that may be read is unreadable, empty or a pointer. Reads a few bytes of each. Raises CheckpointError."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise _unreadable(directory, error) from None
    for name in names:
        path = directory / name
        if name.endswith(_READ) and not path.is_dir():
            try:
                with path.open("rb") as file:
                    head = file.read(256)
            except OSError as error:
                raise _unreadable(path, error) from None
            if not head and name.endswith((".json", ".safetensors", ".model")):
                raise CheckpointError(f"{path} is empty; {_FETCH}")
            _check_pointer(path, head)


def first_line(error: BaseException) -> str:
    """Of what a library says, for a sentence of ours; without the full stop."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return (lines[0].rstrip(".:;") if lines else type(error).__name__)[:300]


def _check_pointer(path: Path, content: bytes) -> None:
    if content.startswith(_LFS):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory, or download it"
        )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return CheckpointError(f"{path} is a link to a file that is not there; {_FETCH}")
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} is missing; {_FETCH}, or name the directory of a transformers checkpoint")
    if isinstance(error, PermissionError):
        return CheckpointError(f"{path} may not be read by this user; change its permissions")
    return CheckpointError(f"{path} cannot be read ({error.strerror or error}); {_FETCH}")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "list", str: "string", bool: "boolean"}.get(type(value), "number")
