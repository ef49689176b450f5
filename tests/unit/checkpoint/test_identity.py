"""Which weights these are: every byte counts, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoint import identity
from checkpoint.identity import file_digest, model_identity
from tests.support.checkpoints import write_safetensors

TENSORS = {"a.weight": ("F32", (400, 300)), "b.weight": ("BF16", (8,))}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(identity, "_PIECE_BYTES", 1 << 16)  # several pieces
    return tmp_path / "home"


def changed_at(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("position", [-1, 200_000, 70_000, 300_000])
def test_one_bit_anywhere_is_another_model(tmp_path: Path, position: int) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", TENSORS)
    before = model_identity({"a": 1}, [path])
    changed_at(path, position)
    assert model_identity({"a": 1}, [path]) != before


def test_the_configuration_counts_and_who_wrote_it_does_not(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", TENSORS)
    one = model_identity({"rope_theta": 1e4, "transformers_version": "5.0"}, [path])
    assert one == model_identity({"transformers_version": "5.23", "rope_theta": 1e4}, [path])
    assert one != model_identity({"rope_theta": 1e5}, [path])


def test_it_is_the_same_wherever_it_lies_and_however_many_threads_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = write_safetensors(tmp_path / "a" / "model.safetensors", TENSORS)
    two = write_safetensors(tmp_path / "b" / "model.safetensors", TENSORS)
    first = model_identity({}, [one])
    monkeypatch.setattr(identity, "_THREADS", 1)
    assert model_identity({}, [two]) == first


def test_the_digest_is_read_from_the_cache_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", TENSORS)
    hashed: list[Path] = []
    real = identity._hashed
    monkeypatch.setattr(identity, "_hashed", lambda file, size: (hashed.append(file), real(file, size))[1])
    assert file_digest(path) == file_digest(path)
    assert len(hashed) == 1
    stat = path.stat()
    changed_at(path, -1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size, and the same age: the change time tells
    file_digest(path)
    assert len(hashed) == 2


def test_a_cache_that_cannot_be_used_costs_time_only(tmp_path: Path, own_cache: Path) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", TENSORS)
    first = file_digest(path)
    for kept in (own_cache / "identities").iterdir():
        if kept.suffix != ".lock":
            kept.write_text("nonsense")
    assert file_digest(path) == first
    for kept in (own_cache / "identities").iterdir():
        kept.unlink()
    (own_cache / "identities").rmdir()
    (own_cache / "identities").write_text("a file in the way")
    assert file_digest(path) == first
