"""What Ray is told before it starts, or before one is joined."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from deploy import ray_access
from deploy.config import RayConfig
from deploy.ray_access import RayAccessError, for_joining, for_local, private_directory


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [*os.environ]:
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")  # so that what the code sets is gone after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    short = tmp_path / "t"
    short.mkdir()
    monkeypatch.setenv("DIPTYCH_RAY_TMP", str(short))
    monkeypatch.setattr(ray_access, "_MAX_DIRECTORY_CHARS", 4096)
    monkeypatch.setattr(ray_access, "_tell_ray", lambda: None)


def test_a_local_cluster_stays_on_loopback_and_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    told = for_local(RayConfig())
    assert told["_node_ip_address"] == "127.0.0.1"
    assert told["address"] == "local"
    assert told["include_dashboard"] is False
    assert os.environ["RAY_AUTH_MODE"] == "token"
    first = os.environ["RAY_AUTH_TOKEN"]
    assert len(first) == 64
    del os.environ["RAY_AUTH_TOKEN"]
    for_local(RayConfig())
    assert os.environ["RAY_AUTH_TOKEN"] != first


def test_a_token_that_is_named_is_used(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret\n")
    file.chmod(0o600)
    os.environ["RAY_AUTH_TOKEN"] = "another, which Ray would take first"
    for_local(RayConfig(token_file=str(file)))
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(file)
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [(None, 0, "cannot be read"), ("\n", 0o600, "is empty"), ("secret", 0o644, "chmod 600")],
)
def test_a_token_file_that_is_no_good(tmp_path: Path, content: str | None, mode: int, words: str) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    for start in (for_local, for_joining):
        with pytest.raises(RayAccessError, match=words):
            start(RayConfig(address="10.0.0.1:6379", token_file=str(file)))


def test_joining_needs_a_token_unless_told_otherwise(tmp_path: Path) -> None:
    config = RayConfig(address="10.0.0.1:6379")
    with pytest.raises(RayAccessError, match="authentication: none"):
        for_joining(config)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert for_joining(config) == {"address": "10.0.0.1:6379"}
    assert os.environ["RAY_AUTH_MODE"] == "token"
    for_joining(config.model_copy(update={"authentication": "none"}))
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_rays_directory_is_its_users_alone(tmp_path: Path) -> None:
    directory = private_directory()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.chmod(0o777)
    assert stat.S_IMODE(private_directory().stat().st_mode) == 0o700
    directory.rmdir()
    (tmp_path / "elsewhere").mkdir()
    directory.symlink_to(tmp_path / "elsewhere")  # as another user may have put it there
    with pytest.raises(RayAccessError, match="is not a directory owned by this user"):
        private_directory()
