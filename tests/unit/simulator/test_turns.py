"""A leap worker's prompts: the room that they hold, and whose turn it is."""

from __future__ import annotations

from engine.chunk_budget import ChunkBudget
from engine.overload import TURN_STEPS
from simulator.jobs import Job, drop_room, publish, take_room
from simulator.learned import LeapEstimate, learned_steps
from simulator.prefix_cache import PrefixCache
from simulator.spec import ClusterSpec
from simulator.turns import FOR_EVER, Turns


def job(number: int, prompt_tokens: int, due_s: float = 0.0, blocks: int = 0) -> Job:
    made = Job(number, None, prompt_tokens, 1, tuple(range(1, blocks + 1)), due_s=due_s, goal=prompt_tokens)
    made.order = (due_s, number)
    return made


def turns(*, due_dates: bool) -> Turns:
    learned = LeapEstimate(learned_steps(ClusterSpec().costs().step, 2048, decodes=True))
    return Turns(learned, ChunkBudget(None, learned), PrefixCache(1 << 16, 64), 2048, due_dates=due_dates)


def test_room_is_taken_as_a_whole_named_when_computed_and_dropped_but_for_the_names() -> None:
    cache, first, second = PrefixCache(1024, 64), job(1, 300, blocks=4), job(2, 300, blocks=4)
    assert not take_room(cache, job(3, 2000), 2000, leave_one=True)
    assert cache.free_tokens == 1024
    assert take_room(cache, first, 300, leave_one=True)
    assert (first.named, first.unnamed, first.computed) == (0, 300, 0)
    first.computed = 300
    publish(cache, first)
    assert (first.named, first.unnamed) == (4, 44)
    assert take_room(cache, second, 300, leave_one=True)
    assert (second.named, second.unnamed, second.cached) == (4, 44, 256)
    assert cache.free_tokens == 1024 - 256 - 2 * 44, "the names are held once"
    drop_room(cache, first)
    drop_room(cache, second)
    assert cache.free_tokens == 1024
    assert cache.match(first.names) == 4


def test_without_due_dates_prompts_keep_the_order_of_arrival() -> None:
    early, late = job(1, 9000), job(2, 10)
    line, steps = turns(due_dates=False).line([late], [early], 0.0, 0, 0)
    assert (line, steps) == ([early, late], FOR_EVER)


def test_who_cannot_be_in_time_goes_to_the_back_and_gets_every_last_turn() -> None:
    hopeless, urgent = job(1, 60000, due_s=0.001), job(2, 100, due_s=5.0)
    due = turns(due_dates=True)
    line, steps = due.line([], [hopeless, urgent], 0.0, 0, 0)
    assert (line, steps, due.put_back) == ([urgent, hopeless], TURN_STEPS - 1, [hopeless])
    due.passed(steps)
    line, steps = due.line([], [hopeless, urgent], 0.0, 0, 0)
    assert (line, steps) == ([hopeless, urgent], 1)
    due.passed(steps)
    assert due.line([], [hopeless, urgent], 0.0, 0, 0)[1] == TURN_STEPS - 1
    assert due.line([], [urgent], 0.0, 0, 0) == ([urgent], FOR_EVER)
    assert not due.put_back
