"""A rolling upgrade in virtual time: every worker drains and comes back with another KV layout, one after the other,
and every router is replaced, while requests come. Nothing fails, and every answer is exact.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.errors import Code, Failure
from router.placement.cluster import Role
from router.request import Finish
from tests.scenarios.nodes import SimRouter
from tests.scenarios.scenario import Scenario, SimClient
from tests.support.tiers import tiered

SEEDS, PAUSE_S = 8, 1.3  # a worker that is back has sent a heartbeat within that


class Upgrade(Scenario):
    """The old shape's workers hold blocks of two tokens and the new one's of four, or the other way round."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.num_decode, self.num_routers, self.load_s, self.calm = max(2, self.num_decode), 2, 8.0, False
        self.switching = None  # a worker that comes back has its own role again
        self.upgraded: list[str] = []

    def _plan_poison(self) -> None:
        pass

    def _plan_faults(self) -> None:
        self.faults.append("a rolling upgrade")
        self.disturbing_until = self.start + 90.0
        old = self.world.shape
        size = 6 - old.block_tokens
        more = {name: getattr(old, name) * old.block_tokens // size + 2 for name in ("prefill_blocks", "decode_blocks")}
        new = replace(old, block_tokens=size, layout="another", **more)
        names = [f"d{i}" for i in range(self.num_decode)] + [f"p{i}" for i in range(self.num_prefill)]
        names.insert(1, "r0")
        names.append("r1")
        self.clock.at(0.5, lambda: setattr(self.world, "shape", new))
        self.clock.at(0.6, lambda: self._replace(names))

    def _replace(self, names: list[str]) -> None:
        """The first of them; the others when that is back."""
        if not names:
            return
        name, rest = names[0], names[1:]

        def back() -> None:
            if name[0] == "r":
                SimRouter(self.world, name, self.config)
            else:
                self.world.start_worker(name, Role.DECODE if name[0] == "d" else Role.PREFILL)
            self.upgraded.append(name)
            self.clock.at(PAUSE_S, lambda: self._replace(rest))

        if name[0] == "r":
            self.world.routers[name].die()
            for client in self.clients:  # their connections break
                if client.router == name and client.ended_at is None:
                    self._come_back(client)
            self.router_faults += 1
            self.clock.at(0.3, back)
            return
        worker = self.world.worker(name)
        assert worker is not None
        worker.drain(lambda: self.clock.at(0.1, back))

    def _permitted(self, c: SimClient, failure: Failure) -> bool:
        """What was asked for in no time may be refused, or late."""
        if self._adapter_excuses(c, failure):
            return True
        short = c.request.deadline - c.request.arrived < 10.0
        return short and failure.code in (Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)


@pytest.mark.parametrize("chunk", tiered(range(2), range(2, 10)))
def test_a_layout_changes_worker_by_worker_and_no_request_notices(chunk: int) -> None:
    finished = resumed = split = 0
    for seed in range(chunk * SEEDS, (chunk + 1) * SEEDS):
        scenario = Upgrade(seed)
        if scenario.moving is None:
            scenario.run()
        else:
            with scenario.moving.patched():
                scenario.run()
        assert len(scenario.upgraded) == scenario.num_decode + scenario.num_prefill + 2
        assert {w.shape.layout for w in scenario.world.workers.values()} == {"another"}
        finished += sum(c.finish in (Finish.STOP, Finish.LENGTH) for c in scenario.clients)
        resumed += sum(c.resumes > 0 for c in scenario.clients)
        split += sum(c.split for c in scenario.clients)
    assert finished > SEEDS
    assert split
