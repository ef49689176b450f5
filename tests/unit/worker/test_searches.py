"""A beam search that finds no room on a worker ends with an error that says so, and leaves nothing."""

from __future__ import annotations

from engine.beams import BeamParams
from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.scheduler import EngineLimits
from engine.types import SamplingParams
from engine.waiting_searches import GIVE_UP_S
from worker.core import WorkerCore
from worker.messages import Code, Ended, RouterCommands, RouterConnected, StartSequence


def test_a_search_that_has_waited_too_long_is_given_up() -> None:
    pool = BlockPool(64)
    worker = WorkerCore(EngineCore(EngineLimits(4, 16, 8, 32, 64, 100), pool), report_every_s=1000.0)
    room = pool.allocate(50) or []
    start = StartSequence(7, "r", [5, 6, 7], (), SamplingParams(max_tokens=20), beams=BeamParams(4, 1))
    worker.handle(RouterConnected(1), 0.0)
    worker.handle(RouterCommands(1, (start,), 0.0), 0.0)
    ended: list[Ended] = []
    for now in (0.0, GIVE_UP_S - 0.1, GIVE_UP_S):
        worker.tick(now)
        assert worker.schedule(now) is None
        outbox = worker.take_outbox()
        ended = [] if outbox is None or 1 not in outbox.links else outbox.links[1].ends
        assert bool(ended) == (now == GIVE_UP_S)
    assert [(end.sequence_id, end.code) for end in ended] == [(7, Code.RESOURCE_EXHAUSTED)]
    assert "a search of 4 beams has waited 60 s for 24 free KV blocks" in ended[0].error
    assert worker.is_idle()
    pool.unpin(room)
    assert pool.is_idle()
