"""What NIXL refuses is said with the step and the fix. NIXL itself is a fake here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer import nixl_agent
from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerId
from kv_transfer.nixl_agent import NixlAgent, NixlUnavailable
from tests.support.kv_pool import Pool


class nixlBackendError(Exception):
    pass


class Nixl:
    """Fails at the n-th call of one kind."""

    def __init__(self, fails: str, nth: int) -> None:
        self._fails, self._left = fails, nth

    def _call(self, name: str) -> None:
        if name == self._fails:
            self._left -= 1
            if self._left == 0:
                raise nixlBackendError("NIXL_ERR_BACKEND")

    def nixl_agent(self, name: str, config: Any) -> Any:
        self._call("nixl_agent")
        return self

    def nixl_agent_config(self, **_: Any) -> Any:
        return SimpleNamespace()

    def register_memory(self, memory: Any, kind: str) -> Any:
        self._call("register_memory")
        return object()

    def prep_xfer_dlist(self, agent: str, rows: Any, kind: str) -> Any:
        self._call("prep_xfer_dlist")
        return object()


@pytest.mark.parametrize(
    ("fails", "nth", "words"),
    [
        ("nixl_agent", 1, "could not open UCX"),
        ("register_memory", 1, r"could not register the KV pools, 0\.0 GiB of cpu memory"),
        ("register_memory", 2, "could not register the generations"),
        ("prep_xfer_dlist", 1, "could not prepare the list of 4 KV blocks"),
        ("prep_xfer_dlist", 3, "could not prepare the lists of generations"),
    ],
)
def test_the_step_that_failed_is_named(monkeypatch: pytest.MonkeyPatch, fails: str, nth: int, words: str) -> None:
    monkeypatch.setattr(nixl_agent, "_load_nixl", lambda: Nixl(fails, nth))
    with pytest.raises(NixlUnavailable, match=words) as raised:
        NixlAgent(PeerId("one", 1), TransportConfig(), Pool([(4, 4096)]).memory())
    said = str(raised.value)
    assert "nixlBackendError: NIXL_ERR_BACKEND" in said
    assert ("network interface" in said) == (fails == "nixl_agent"), said
    assert ("ulimit -l" in said) == (fails != "nixl_agent"), said


@pytest.mark.parametrize("kind", ["DRAM", "VRAM"])
def test_the_hint_on_memory_names_what_its_kind_needs(kind: str) -> None:
    assert ("nvidia_peermem" in nixl_agent._hint_on_memory(kind)) == (kind == "VRAM")
