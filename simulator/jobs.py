"""A leg on a leap worker, and the room that it holds: leading blocks by name, shared, and tokens without a name.

take_room ──> unnamed ── computed: publish ──> named ── drop_room ──> idle in the cache
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from simulator.gaps import Snapshot
from simulator.prefix_cache import PrefixCache


@dataclass(slots=True, eq=False)
class Job:
    """One leg on one worker."""

    number: int
    flight: Any  # the request that it belongs to
    prompt_tokens: int
    output_tokens: int
    names: Sequence[int]
    hand_over: bool = False
    due_s: float = 0.0  # its first token
    weight: float = 1.0  # of its work, when somebody is put back
    computed: int = 0
    cached: int = 0
    goal: int = 0  # tokens to compute before the next one is sampled; after giving way, the answer so far too
    unnamed: int = 0  # tokens held without a name
    named: int = 0  # leading blocks held by name
    emitted: int = 0
    emitted_before: int = 0  # when it began to decode here
    gaps_since: Snapshot | None = None
    extra_gaps_ms: list[float] = field(default_factory=list)
    last_token_s: float = 0.0
    second_token_s: float = 0.0  # what one waits for after it is the worker's steps alone
    running: bool = False
    started_s: float = -1.0
    order: tuple[float, int] = (0.0, 0)
    found: int = 0  # cached when it was queued


by_order = attrgetter("order")


def take_room(cache: PrefixCache, job: Job, tokens: int, *, leave_one: bool, spare: int = 0) -> bool:
    """Cached prefix plus fresh room for the rest, all or nothing; sets what is computed already."""
    usable = (tokens - 1 if leave_one else tokens) // cache.block_tokens
    names = job.names[:usable]
    matched = cache.match(names)
    fresh = tokens - matched * cache.block_tokens
    free, names = cache.free_tokens - spare, names[:matched]
    # What is cached and idle takes room too; most often there is room for all of it.
    if tokens > free and fresh + cache.idle_tokens(names) > free:
        return False
    cache.hold(names)
    job.named, job.unnamed = matched, fresh
    cache.use(fresh)
    job.computed = matched * cache.block_tokens
    if not job.emitted:
        job.cached = job.computed
    return True


def publish(cache: PrefixCache, job: Job) -> None:
    """The prompt's computed blocks get their names."""
    full = min(len(job.names), job.computed // cache.block_tokens)
    if full > job.named:
        added = cache.hold(job.names[job.named : full], job.names[job.named - 1] if job.named else 0)
        tokens = (full - job.named) * cache.block_tokens
        cache.use(-tokens)
        job.unnamed -= tokens
        job.named = full
        if added:
            cache.make_room()


def drop_room(cache: PrefixCache, job: Job) -> None:
    """Nothing is held any more; named blocks stay cached."""
    cache.release(job.names[: job.named])
    cache.use(-job.unnamed)
    job.named = job.unnamed = 0
