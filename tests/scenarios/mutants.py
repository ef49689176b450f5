"""Known bugs of the field, planted one at a time: a checker that cannot fail is worth nothing.

`python -m tests.scenarios.mutants` plants each and tells after how many seeds it was found. Each patch is the smallest
change that makes the product wrong in that way; `within` is the bound that a test holds.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.kv_groups import KvGroups
from engine.sequence import Status
from engine.types import StepEvents
from kv_transfer.block_hash import root_hash
from kv_transfer.handoff import FinalAnnounced, Release
from kv_transfer.lease import LeaseTable
from kv_transfer.reader import HandoffReader, _Track
from kv_transfer.source import HandoffSource
from kv_transfer.transport import PullStatus
from prefill_worker.core import PrefillCore
from router.forks import Forks
from router.legs import LegRole
from router.lifecycle import Life
from router.placement.cluster import Cluster
from router.placement.view import Pool
from tests.scenarios.model import ScriptedModel
from tests.scenarios.network import SimTransport
from tests.scenarios.nodes import SimWorker, World
from tests.scenarios.scenario import ScenarioFailed, run
from worker.core import WorkerCore


def _skip_the_fence() -> Any:
    """The reader adopts without comparing generations: a late read returns another request's KV."""
    return mock.patch.object(SimTransport, "verify", return_value=(PullStatus.ARRIVED, ""))


def _reuse_without_raising_the_generation() -> Any:
    """Blocks freed by an expired lease under a reader are given out again under the same generation."""

    def allocate(self: BlockPool, count: int, group: int = 0) -> list[int] | None:
        before = list(self._generations)
        blocks = original(self, count, group)
        self._generations[:] = before
        return blocks

    original = BlockPool.allocate
    return mock.patch.object(BlockPool, "allocate", allocate)


def _reuse_the_blocks_of_an_abandoned_pull() -> Any:
    """A released transfer is taken for a finished one."""

    def drop(self: HandoffReader, reading: Any, **options: Any) -> None:
        in_flight = set(reading.in_flight)
        original(self, reading, **options)
        for pull_id in in_flight:
            pull = self._pulls.pop(pull_id)
            self._pins.unpin(pull.local_blocks[::-1])

    original = HandoffReader._drop
    return mock.patch.object(HandoffReader, "_drop", drop)


def _forget_cancel_between_the_legs() -> Any:
    """The client leaves; decode hears of it, prefill computes on and its lease stays."""

    def cancel(self: Life, leg: Any, reason: str, *, keep_lease: bool = False) -> None:
        if leg.role is LegRole.DECODE:
            self._workers.cancel(leg.worker, leg.number, reason, keep_lease)
        self._drop(leg)

    return mock.patch.object(Life, "_cancel", cancel)


def _leases_of_a_lost_router_stay() -> Any:
    """Nobody ends what a router left that died, and silence does not end it either."""
    return _both(
        mock.patch.object(LeaseTable, "expire", return_value=[]),
        mock.patch.object(PrefillCore, "_link_lost", return_value=None),
    )


def _forget_cancel_after_handing_over() -> Any:
    """A cancel that comes when prefill has handed over finds no sequence, and the lease stands."""
    return mock.patch.object(PrefillCore, "_cancelled_late", return_value=None)


def _reuse_an_epoch() -> Any:
    """A restarted worker takes the name and epoch of the one before; its memory is another."""

    def init(self: World, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.reuse_epochs = True

    original = World.__init__
    return mock.patch.object(World, "__init__", init)


def _pass_duplicates_on() -> Any:
    """What decode repeats after adopting reaches the client a second time."""

    def on_token(self: Life, leg_number: int, position: int, token_id: int, logprobs: Any, now: float) -> None:
        return original(self, leg_number, max(position, len(self.emitted)), token_id, logprobs, now)

    original = Life.on_token
    return mock.patch.object(Life, "on_token", on_token)


def _resume_with_another_seed() -> Any:
    """A request that is moved samples anew instead of by (seed, position)."""

    def moved(self: Life, now: float) -> None:
        original(self, now)
        sampling = replace(self.request.sampling, seed=self.request.sampling.seed + 1)
        self.request = replace(self.request, sampling=sampling)

    original = Life._moved
    return mock.patch.object(Life, "_moved", moved)


def _release_frees_twice() -> Any:
    """A release that comes twice, or after an expiry, gives blocks back twice."""

    def end(self: LeaseTable, lease_id: str, how: Any) -> bool:
        lease = self._leases.get(lease_id)
        if lease is not None and lease.block_ids:
            self._pins.unpin(lease.block_ids[:1])
        return original(self, lease_id, how)

    original = LeaseTable.end
    return mock.patch.object(LeaseTable, "end", end)


def _the_shared_prompt_goes_with_the_first_cancelled_answer() -> Any:
    """Whoever of several answers to a prompt is cancelled first takes the prompt's blocks along."""

    def cancel(self: EngineCore, sequence_id: int) -> bool:
        sequence = self._sequences.get(sequence_id)
        if sequence is not None and sequence.status is Status.RUNNING:
            for block in {b for table in sequence.tables for b in table if b >= 0}:
                self.pool._references[block] = 1
        return original(self, sequence_id)

    original = EngineCore.cancel
    return mock.patch.object(EngineCore, "cancel", cancel)


def _nobody_goes_first_after_the_first_answer() -> Any:
    """The answer that others wait for is cancelled, and they wait on."""
    return mock.patch.object(Forks, "_next", return_value=None)


def _adopt_before_the_last_block() -> Any:
    """The final announcement is taken for the end of the transfer."""

    def complete(self: HandoffReader, reading: Any, now: float) -> None:
        track = reading.tracks[0]
        if reading.final is not None and track.room is not None:
            for pull_id in list(reading.in_flight):
                self._pulls[pull_id].reading = None
            reading.in_flight.clear()
            track.next_index = len(track.room.table)
            track.arrived.update(range(track.room.skip, track.next_index))
        original(self, reading, now)

    original = HandoffReader._complete_if_done
    return mock.patch.object(HandoffReader, "_complete_if_done", complete)


def _the_poison_goes_on_to_the_next_worker() -> Any:
    """Who was in a crashed worker's batch is carried on, however often."""
    return mock.patch("router.placement.crashes.crashed", return_value=[])


def _a_window_lets_go_too_early() -> Any:
    """Of one block that the next token still looks at."""

    def leave_behind(self: KvGroups, sequence: Any) -> None:
        computed, sequence.num_computed = sequence.num_computed, sequence.num_computed + self._block_tokens
        original(self, sequence)
        sequence.num_computed = computed

    original = KvGroups.leave_behind
    return mock.patch.object(KvGroups, "leave_behind", leave_behind)


def _a_reservation_keeps_what_it_gave_back() -> Any:
    """One group has no room, and the sequence's table in another names blocks that are no longer its own."""

    def reserve(self: KvGroups, sequence: Any, names: Any, num_tokens: int) -> Any:
        rooms = original(self, sequence, names, num_tokens)
        if rooms is None and len(self.rules) > 1:
            sequence.tables[0] = self.pool.match(names) or [0]
        return rooms

    original = KvGroups.reserve
    return mock.patch.object(KvGroups, "reserve", reserve)


def _a_group_is_not_announced() -> Any:
    """A source forgets the groups after the first, and the reader counts blocks in place of proving that all came."""

    def announce(self: HandoffSource, handoff_id: str, first: int, blocks: Any, now: float, group: int = 0) -> Any:
        return None if group else original(self, handoff_id, first, blocks, now)

    def span(self: _Track) -> range:
        return spanned(self) if self.remote or self.room is None else range(self.room.first, len(self.room.table))

    original, has, spanned = HandoffSource.announce, _Track.has, _Track.span
    proofs = (
        mock.patch.object(_Track, "has", lambda self, needed, room: not self.remote or has(self, needed, room)),
        mock.patch.object(_Track, "span", span),
    )
    return _both(mock.patch.object(HandoffSource, "announce", announce), *proofs)


def _a_state_is_announced_before_its_end() -> Any:
    """As a block would be: when the first chunk is computed."""

    def announce(
        self: PrefillCore, engine_id: int, serving: Any, computed: int, now: float, *, whole: bool = False
    ) -> bool:
        state = self.engine.groups.state
        if state is not None and state not in serving.announced and serving.tables:
            serving.announced[state] = 1
            if self.source.announce(serving.handoff_id, 0, serving.tables[state], now, state) is not None:
                return True
        return original(self, engine_id, serving, computed, now, whole=whole)

    original = PrefillCore._announce_up_to
    return mock.patch.object(PrefillCore, "_announce_up_to", announce)


def _one_name_for_blocks_of_both_tables() -> Any:
    """A long prompt finds blocks that were made by the short rotary table."""

    def root(identity: str, block_tokens: int, salt: str, *, long: bool = False, adapter: str = "") -> bytes:
        return root_hash(identity, block_tokens, salt, adapter=adapter)

    return mock.patch("engine.core.root_hash", root)


def _the_cache_stays_when_the_table_changes() -> Any:
    """A sequence that outgrows the original context goes on behind keys of the short rotary table."""

    def go_on(self: EngineCore, sequence: Any) -> None:
        sequence.long, sequence.ending = True, False

    return mock.patch.object(EngineCore, "_begin_again_long", go_on)


# Of running answers that go on elsewhere.


def _release_before_all_has_arrived() -> Any:
    """The reader takes the source's last word for the end: the lease goes while pulls are under way."""

    def on_message(self: HandoffReader, source: Any, message: Any, now: float) -> None:
        original(self, source, message, now)
        reading = self._by_handoff.get(message.handoff_id)
        if isinstance(message, FinalAnnounced) and reading is not None and reading.running is not None:
            self._out.append((source, Release(message.handoff_id, adopted=True)))

    original = HandoffReader.on_message
    return mock.patch.object(HandoffReader, "on_message", on_message)


def _announce_the_unfinished_block() -> Any:
    """The last block of a running sequence is announced while steps still write it."""

    def announce(
        self: PrefillCore, engine_id: int, serving: Any, computed: int, now: float, *, whole: bool = False
    ) -> bool:
        if serving.most_tokens and not whole and self.engine.groups.alone:
            size = self._block_tokens
            computed = min(-(-computed // size), len(serving.tables[0])) * size
        return original(self, engine_id, serving, computed, now, whole=whole)

    original = PrefillCore._announce_up_to
    return mock.patch.object(PrefillCore, "_announce_up_to", announce)


def _switch_the_stream_before_the_commit() -> Any:
    """The router ends the source when the target has caught up, not when it has adopted."""

    def on_caught_up(self: Life, leg_number: int, handoff_id: str, now: float) -> None:
        handoff = self._handoff
        source = self._legs.get(handoff.leg) if handoff is not None and handoff.migration is not None else None
        if source is not None:
            self._cancel(source, "the target has it")

    return mock.patch.object(Life, "on_caught_up", on_caught_up)


def _count_only_the_targets_own_tokens() -> Any:
    """Penalties of an answer that came from elsewhere begin anew."""

    def execute(self: ScriptedModel, item: Any, *rest: Any) -> Any:
        came_with = self._came_with.setdefault(item.sequence_id, item.position)
        first = item.prompt_len + (came_with if came_with > 1 else 0)  # one token comes with every prompt handed over
        return original(self, replace(item, prompt_len=first), *rest)

    def init(self: ScriptedModel, *args: Any) -> None:
        made(self, *args)
        self._came_with = {}  # type: ignore[attr-defined]

    original, made = ScriptedModel._run, ScriptedModel.__init__
    return _both(mock.patch.object(ScriptedModel, "_run", execute), mock.patch.object(ScriptedModel, "__init__", init))


def _freeze_under_a_step_in_flight() -> Any:
    """The handover says what stands, and the step in flight writes the announced block after that."""

    def freeze(self: EngineCore, sequence_id: int) -> StepEvents:
        sequence = self._sequences[sequence_id]
        events = StepEvents()
        if sequence.status is Status.RUNNING and sequence.uncomputed == 1 and sequence.num_emitted:
            sequence.hand_over = True
            events.progress.append(self._progress(sequence))
            self._end(sequence, None, events)
            return events
        return original(self, sequence_id)

    original = EngineCore.freeze
    return mock.patch.object(EngineCore, "freeze", freeze)


def _keep_leaves_the_lease() -> Any:
    """The sequence goes on here, and its blocks stay leased to nobody."""

    def stop_serving(self: PrefillCore, engine_id: int, serving: Any, why: str, now: float) -> None:
        del self._serving[engine_id]
        self.engine.keep(engine_id)

    return mock.patch.object(PrefillCore, "_stop_serving", stop_serving)


def _go_on_beyond_the_targets_room() -> Any:
    """Nobody ends the race of a source that samples faster than its KV is pulled."""
    return mock.patch.object(PrefillCore, "_freeze_at_most", return_value=None)


def _hand_over_without_the_log_probabilities() -> Any:
    """What the router hears from the target first comes without them."""

    def finish(self: HandoffSource, *args: Any, logprobs: Any = (), **options: Any) -> None:
        original(self, *args, **options)

    original = HandoffSource.finish
    return mock.patch.object(HandoffSource, "finish", finish)


def _announce_the_state_of_a_running_sequence() -> Any:
    """A state is of use only at the token boundary where it is handed over."""

    def announce(
        self: PrefillCore, engine_id: int, serving: Any, computed: int, now: float, *, whole: bool = False
    ) -> bool:
        state = self.engine.groups.state
        if serving.most_tokens and state is not None and state not in serving.announced:
            serving.announced[state] = 1
            if self.source.announce(serving.handoff_id, 0, serving.tables[state], now, state) is not None:
                return True
        return original(self, engine_id, serving, computed, now, whole=whole)

    original = PrefillCore._announce_up_to
    return mock.patch.object(PrefillCore, "_announce_up_to", announce)


# Of adapters that come and go.


def _one_name_for_blocks_of_all_adapters() -> Any:
    """A prompt with one adapter finds blocks that another one made."""

    def root(identity: str, block_tokens: int, salt: str, *, long: bool = False, adapter: str = "") -> bytes:
        return root_hash(identity, block_tokens, salt, long=long)

    return mock.patch("engine.core.root_hash", root)


def _an_adapter_goes_while_a_lease_is_read_for_it() -> Any:
    """Only sequences with a slot count: not those whose KV is on its way, which have none yet."""
    return mock.patch.object(WorkerCore, "uses_adapter", return_value=False)


# Of roles that change.


def _the_old_roles_prompts_are_dropped() -> Any:
    """Who takes another part forgets what has not begun, and tells nobody."""

    def set_role(self: WorkerCore, role: str) -> None:
        before = self.role
        original(self, role)
        for engine_id in self.engine.not_started() if self.role != before else ():
            hosted = self._hosted.get(engine_id)
            if hosted is not None:
                self._end_by_us(hosted, "not my part any more", 0.0)

    original = WorkerCore._set_role
    return mock.patch.object(WorkerCore, "_set_role", set_role)


def _a_worker_counts_in_both_pools() -> Any:
    """The new role is noted, and the pool of the old one keeps the worker."""

    def said_role(self: Cluster, key: Any, role: Any, changes: int) -> bool:
        with mock.patch.object(Pool, "drop"):
            return original(self, key, role, changes)

    original = Cluster.said_role
    return mock.patch.object(Cluster, "said_role", said_role)


def _only_the_router_that_asked_hears_of_the_role() -> Any:
    """The worker answers who told it; the others learn nothing, by heartbeats neither."""

    def set_role(self: WorkerCore, role: str) -> None:
        before = set(self._by_link)
        original(self, role)
        for link in sorted(before)[1:]:
            self._out(link).role = None

    def said(self: SimWorker) -> Any:
        return replace(info.fget(self), role=self.role, role_changes=0)  # type: ignore[misc]

    original, info = WorkerCore._set_role, SimWorker.info
    return _both(
        mock.patch.object(WorkerCore, "_set_role", set_role), mock.patch.object(SimWorker, "info", property(said))
    )


def _a_role_sticks_to_the_name() -> Any:
    """A worker that is back is taken for what it was before it died."""

    def registered(self: Cluster, info: Any, now: float, *, leaving: bool) -> Any:
        entry, older = original(self, info, now, leaving=leaving)
        for one in older:
            entry.role = one.role
        return entry, older

    original = Cluster.registered
    return mock.patch.object(Cluster, "registered", registered)


@contextlib.contextmanager
def _both(*patches: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


@dataclass(frozen=True)
class Mutant:
    plant: Callable[[], Any]
    within: int

    @property
    def name(self) -> str:
        return self.plant.__name__.strip("_")


MUTANTS = [
    Mutant(_skip_the_fence, 400),
    Mutant(_reuse_without_raising_the_generation, 400),
    Mutant(_reuse_the_blocks_of_an_abandoned_pull, 100),
    Mutant(_forget_cancel_between_the_legs, 400),
    Mutant(_leases_of_a_lost_router_stay, 400),
    Mutant(_forget_cancel_after_handing_over, 4000),
    Mutant(_reuse_an_epoch, 4000),
    Mutant(_pass_duplicates_on, 20),
    Mutant(_resume_with_another_seed, 100),
    Mutant(_release_frees_twice, 20),
    Mutant(_adopt_before_the_last_block, 20),
    Mutant(_the_shared_prompt_goes_with_the_first_cancelled_answer, 100),
    Mutant(_nobody_goes_first_after_the_first_answer, 100),
    Mutant(_the_poison_goes_on_to_the_next_worker, 100),
    Mutant(_a_window_lets_go_too_early, 100),
    Mutant(_a_reservation_keeps_what_it_gave_back, 200),
    Mutant(_a_group_is_not_announced, 100),
    Mutant(_a_state_is_announced_before_its_end, 400),
    Mutant(_one_name_for_blocks_of_both_tables, 100),
    Mutant(_the_cache_stays_when_the_table_changes, 100),
    Mutant(_release_before_all_has_arrived, 400),
    Mutant(_announce_the_unfinished_block, 100),
    Mutant(_switch_the_stream_before_the_commit, 100),
    Mutant(_count_only_the_targets_own_tokens, 100),
    Mutant(_freeze_under_a_step_in_flight, 400),
    Mutant(_keep_leaves_the_lease, 100),
    Mutant(_go_on_beyond_the_targets_room, 400),
    Mutant(_hand_over_without_the_log_probabilities, 400),
    Mutant(_announce_the_state_of_a_running_sequence, 400),
    Mutant(_one_name_for_blocks_of_all_adapters, 100),
    Mutant(_an_adapter_goes_while_a_lease_is_read_for_it, 400),
    Mutant(_the_old_roles_prompts_are_dropped, 100),
    Mutant(_a_worker_counts_in_both_pools, 100),
    Mutant(_only_the_router_that_asked_hears_of_the_role, 100),
    Mutant(_a_role_sticks_to_the_name, 100),
]


def seeds_to_find(mutant: Mutant, base: int = 0) -> tuple[int, str] | None:
    """(seeds needed, what was found), or None within the mutant's bound."""
    with mutant.plant():
        for i in range(mutant.within):
            try:
                run(base + i)
            except ScenarioFailed as error:
                return i + 1, str(error).splitlines()[0]
    return None


def main() -> None:
    """`names`: of those to plant; none: all."""
    logging.disable(logging.CRITICAL)  # of crashes, which are what it is for
    missed, names = 0, sys.argv[1:]
    for mutant in [m for m in MUTANTS if not names or m.name in names]:
        found = seeds_to_find(mutant)
        missed += found is None
        seeds, what = found or (mutant.within, "NOT FOUND")
        print(f"{mutant.name:45} {seeds:5} seeds   {what[:110]}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
