"""A cache that cannot be written is no traceback, and costs no speed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from deploy.model_store import ModelStoreError, ensure_embedded_model
from settings import cache
from settings.cache import cache_directory, writable_cache
from settings.model_path import BROUGHT, ModelPathError, resolve_model


@pytest.fixture
def blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place that nobody can write to, root included: it lies below a file."""
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def test_what_is_compiled_goes_to_a_private_directory_instead(blocked: Path) -> None:
    instead = writable_cache("native")
    assert instead.is_relative_to(blocked / "tmp")
    assert instead.parent.stat().st_mode & 0o777 == 0o700
    assert writable_cache("native") == instead


def test_but_never_to_one_that_somebody_else_could_fill(blocked: Path) -> None:
    (blocked / "tmp" / f"diptych-cache-{os.getuid()}").mkdir(mode=0o777)
    (blocked / "tmp" / f"diptych-cache-{os.getuid()}").chmod(0o777)
    with pytest.raises(PermissionError, match="not this user's alone"):
        writable_cache("native")


def test_the_kernels_are_built_there(blocked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.native import build

    monkeypatch.setattr(build, "_compile", lambda compiler, flags, target: target.write_text("built"))
    monkeypatch.setattr(build, "_compiler", lambda: "/bin/sh")
    assert build.built_library().is_relative_to(blocked / "tmp")


def test_the_embedded_model_has_one_sentence_for_it(blocked: Path) -> None:
    with pytest.raises(ModelStoreError, match="set DIPTYCH_HOME to a directory that can be written"):
        ensure_embedded_model()
    with pytest.raises(ModelPathError, match="fetch it with `diptych model`"):
        resolve_model("embedded")


def test_an_image_brings_the_embedded_model(blocked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BROUGHT, str(tmp_path / "model"))
    with pytest.raises(ModelPathError, match="fetch it with `diptych model`"):
        resolve_model("embedded")  # this image does not
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve_model("embedded") == str(tmp_path / "model")
    assert ensure_embedded_model() == tmp_path / "model"


def test_a_user_without_a_home_has_a_cache(blocked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("DIPTYCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache.Path, "home", no_home)
    assert cache_directory().is_relative_to(blocked / "tmp")
