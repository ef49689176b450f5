"""What routers hear of scaling over the directory, without Ray: its actor is called in this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deploy import directory


class Actor:
    """Every method as Ray shows it."""

    def __init__(self) -> None:
        self._real = directory._Directory.__ray_metadata__.modified_class()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._real, name))


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Actor:
    made = Actor()
    monkeypatch.setattr(directory, "_actor", lambda: made)
    monkeypatch.setattr(directory.ray, "get", lambda value, timeout: value)
    monkeypatch.setattr(directory._Beat, "_run", lambda self: None)
    return made


def test_every_router_hears_each_decision_once_also_one_that_starts_later(actor: Actor) -> None:
    first: list[bytes] = []
    router = directory.RouterPresence("a:1", "a:2", lambda message, late_s: first.append(message))
    directory.tell_scaling(b"one")
    router.once()
    directory.tell_scaling(b"two")
    router.once()
    router.once()
    assert first == [b"one", b"two"]
    second: list[bytes] = []
    directory.RouterPresence("b:1", "b:2", lambda message, late_s: second.append(message)).once()
    assert second == [b"one", b"two"]
    assert directory.public_addresses() == ["a:2", "b:2"]


def test_the_directory_keeps_the_last_and_nothing_too_large(actor: Actor) -> None:
    directory.tell_scaling(b"x" * 40_000)
    for i in range(300):
        directory.tell_scaling(b"%d" % i)
    heard: list[bytes] = []
    directory.RouterPresence("a:1", "a:2", lambda message, late_s: heard.append(message)).once()
    assert heard == [b"%d" % i for i in range(44, 300)]
