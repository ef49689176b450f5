"""Prefixes that are pulled from another worker's cache instead of being computed.

    1. begin       the sequence is held in the engine; the holder is asked for the blocks by name (Lend)
    2. announced   blocks are reserved for as much as the holder lends; no room: computed, nobody waits
    3. arrived     verified by the fence, as in any handoff; the blocks become ordinary cached blocks
    4. go on       the sequence is scheduled like any other: it finds them in the cache and computes the rest

Whatever goes wrong in 1 to 3, and when `wait_s` is over, 4 follows with what has arrived by then. So a prefix that is
fetched costs at most about twice what it was to save, and never a request. A holder that does not answer, or whose
bytes do not come, is not asked again for a while: the next prompts must not wait for it too.
"""

from __future__ import annotations

from engine.core import EngineCore
from kv_transfer.handoff import PeerId
from kv_transfer.reader import HandoffBroken, HandoffComplete, HandoffReader, NeedBlocks, ReaderEvent
from worker.messages import PrefixPull

_HOLDERS_FAULT = ("timeout", "peer_lost", "transport_error")  # not: it has the prefix no more, or no lease to give
_AVOID_S = 10.0


class PrefixFetches:
    """The sequences of one worker that wait for a prefix. `reader` is the worker's; engine ids name its readings."""

    def __init__(self, engine: EngineCore, reader: HandoffReader) -> None:
        self._engine = engine
        self._reader = reader
        self._waiting: dict[int, PeerId] = {}  # by engine id: the holder
        self._avoided: dict[PeerId, float] = {}  # until when
        self.arrived_total = 0
        self.failed_total = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, engine_id: int) -> bool:
        return engine_id in self._waiting

    def begin(self, engine_id: int, pull: PrefixPull, now: float) -> None:
        """The sequence is in the engine, held."""
        block_tokens = self._engine.limits.block_tokens
        names = self._engine.block_names(engine_id, pull.num_tokens)
        ref, deadline = pull.ref, now + pull.wait_s
        here_already = self._engine.groups.find(names).blocks == len(names)
        alone = self._engine.groups.alone  # of other layouts prefixes are not lent
        if here_already or not alone or self._avoided.get(ref.source, now) > now:
            self.failed_total += not here_already
            self._engine.continue_locally(engine_id, 0, (), now)
            return
        self._waiting[engine_id] = ref.source
        self._reader.borrow(engine_id, ref.handoff_id, ref.source, names, len(names) * block_tokens, deadline, now)

    def on_event(self, event: ReaderEvent, now: float) -> bool:
        """False: it is about another handoff."""
        engine_id = event.sequence_id
        if engine_id not in self._waiting:
            return False
        match event:
            case NeedBlocks():
                blocks = self._reader.announced_blocks(engine_id)
                reservation = self._engine.reserve(engine_id, blocks * self._engine.limits.block_tokens, now)
                if reservation is None:
                    self.failed_total += 1
                    self._reader.cancel(engine_id, now)
                    self._go_on(engine_id, 0, now)
                else:
                    self._reader.provide(engine_id, reservation.rooms, now)
            case HandoffComplete():
                self.arrived_total += 1
                self._go_on(engine_id, event.num_tokens, now)
            case HandoffBroken():
                self.failed_total += 1
                if event.reason in _HOLDERS_FAULT:
                    self._avoid(self._waiting[engine_id], now)
                self._go_on(engine_id, event.kept_blocks * self._engine.limits.block_tokens, now)
        return True

    def _go_on(self, engine_id: int, tokens: int, now: float) -> None:
        del self._waiting[engine_id]
        self._engine.continue_locally(engine_id, tokens, (), now)

    def _avoid(self, holder: PeerId, now: float) -> None:
        self._avoided = {peer: until for peer, until in self._avoided.items() if until > now}
        self._avoided[holder] = now + _AVOID_S

    def cancel(self, engine_id: int, now: float) -> None:
        """The sequence ends. Destination blocks of pulls that are under way stay pinned until nothing can land."""
        if engine_id in self._waiting:
            del self._waiting[engine_id]
            self._reader.cancel(engine_id, now)
