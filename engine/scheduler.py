"""Which sequences compute which tokens in the next step.

No phases: every sequence catches up `num_computed` with its tokens, at most `max_batch_tokens` of all in one step.

    1. running sequences one token behind (decodes), by order
    2. prompts, by order: chunks of running sequences further behind, and waiting sequences while there are blocks for
       all their known tokens

Beside decodes, prompts get what engine/chunk_budget.py allows.

Decodes may bring drafts (engine/speculation.py): they get the room that all of this leaves, tokens and blocks.

A step may be planned while the one before it computes (`ahead`). A sequence that samples there takes part with a token
that is still to come. What is short of blocks then waits until that step's ends are known, rather than take them from
others.

Order is priority, then due date (without one: arrival); engine/overload.py says who is put back behind the others. So a
prompt that has begun pauses, with its blocks, for one that is due earlier. When a decode finds no block, the last
sequence by order gives way: it loses its blocks, goes back to waiting and is computed again (mostly from the prefix
cache). A waiting sequence never takes blocks from a running one, and who has blocks goes on when those before it wait
for room, so nothing moves in circles. If it is a put-back prompt's turn and there is no room for it, no other begins
until it has room. Beam searches, which need much room, are passed by others (engine/waiting_searches.py).
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

from engine.chunk_budget import ChunkBudget
from engine.kv_groups import KvGroups
from engine.overload import TURN_STEPS, Need, put_back
from engine.prompt_logprobs import rows_at_once
from engine.sequence import Searching, Sequence, Status
from engine.speculation import Speculation
from engine.types import TO_COME, DraftWork, PlanItem
from engine.waiting_searches import WaitingSearches
from kv_transfer.handoff import TokenLogprobs

_LAST_CHUNK_TOKENS = 128
_REVIEW_S = 0.02  # who is put back is looked at when a prompt comes or goes, and after so long


@dataclass(frozen=True, slots=True)
class EngineLimits:
    block_tokens: int
    max_batch_tokens: int
    max_running_sequences: int
    max_waiting_sequences: int
    context_limit_tokens: int
    vocab_size: int
    itl_target_ms: float | None = None  # None: prompts do not make way for decodes
    original_context_tokens: int = 0  # longer sequences have another rotary table (engine/longrope.py); 0: none has

    def __post_init__(self) -> None:
        if self.max_running_sequences > self.max_batch_tokens:
            raise ValueError(
                f"max_running_sequences ({self.max_running_sequences}) exceeds max_batch_tokens "
                f"({self.max_batch_tokens}): every running sequence needs a token a step; lower the first"
            )


class Scheduler:
    """Owns the waiting and running queues. Blocks change hands only here and in EngineCore."""

    def __init__(
        self,
        limits: EngineLimits,
        groups: KvGroups,
        chunk_budget: ChunkBudget,
        speculation: Speculation | None = None,
    ) -> None:
        self._speculation = speculation
        self._limits = limits
        self._groups = groups
        self._chunk_budget = chunk_budget
        self.waiting: list[Sequence] = []  # sorted by order
        self.running: list[Sequence] = []  # sorted by order
        self.searches = WaitingSearches()
        self.preemptions_total = 0
        self._rows_at_once = rows_at_once(limits.vocab_size)
        self._review_at = -math.inf
        self._looks = 0
        self._turn = 0  # steps that prompts ahead of put-back ones have had since it was the others' turn
        self._claim: Sequence | None = None  # its turn came, and there was no room

    def enqueue(self, sequence: Sequence) -> None:
        """To waiting. It holds no blocks there."""
        assert not sequence.block_ids
        sequence.status = Status.WAITING
        if sequence.may_be_put_back:
            self._find(sequence)
        self._review_at = -math.inf
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)
        self.searches.came(sequence)

    def enroll(self, sequence: Sequence) -> None:
        """To running, with its blocks (received KV)."""
        sequence.status = Status.RUNNING
        bisect.insort(self.running, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        queue = self.waiting if sequence.status is Status.WAITING else self.running
        queue.remove(sequence)
        self.searches.left(sequence)
        if sequence is self._claim:
            self._claim = None
        self._review_at = -math.inf

    def schedule(self, now: float, *, ahead: bool = False) -> list[tuple[Sequence, PlanItem]]:
        planned: dict[int, tuple[Sequence, int]] = {}  # sequence id -> tokens to compute
        budget = self._limits.max_batch_tokens
        preempted = False
        self.searches.look(now)

        for sequence in [s for s in self.running if s.remaining == 1]:
            if sequence.status is not Status.RUNNING:
                continue  # gave way to an earlier one in this loop
            while not self._grow(sequence):
                if ahead:
                    return []
                victim = self.running[-1]
                for loser in self._preempt(victim):
                    freed = planned.pop(loser.sequence_id, None)
                    budget += freed[1] if freed else 0
                preempted = True
                if victim is sequence:
                    break
            if sequence.status is Status.RUNNING and budget > 0:
                planned[sequence.sequence_id] = (sequence, 1)
                budget -= 1

        context_tokens = sum(sequence.num_foreseen for sequence, _ in planned.values())
        drafts: dict[int, list[int]] = {}
        decoding: list[Sequence] = []
        if self._speculation is not None and not ahead:
            decoding = [sequence for sequence, _ in planned.values() if sequence.search is None]
        if self._speculation is not None and decoding:
            drafts = self._speculation.propose(decoding)
        allowance = self._chunk_budget.allowance(len(planned), context_tokens, sum(map(len, drafts.values())))

        decodes = len(planned)
        self._review(now, decodes, context_tokens)
        prompts = [s for s in self.running if s.remaining > 1]
        rows_left = self._rows_at_once
        alone, groups = len(prompts) + len(self.waiting) == 1, self._groups
        line: Iterable[Sequence] = heapq.merge(prompts, list(self.waiting), key=_by_order)

        def plan_prompt(sequence: Sequence) -> int:
            nonlocal rows_left
            start = sequence.num_computed + sequence.in_flight
            count = min(budget, allowance.tokens(start))
            count = self._last_chunk(sequence, count) if alone else min(sequence.remaining, count)
            if sequence.wants_prompt:
                count = min(count, rows_left)
            if groups.leaving:
                count = groups.room_for_chunk(sequence, start, count)
            if count > 0 and sequence.wants_prompt:
                rows_left -= count
            if count > 0:
                planned[sequence.sequence_id] = (sequence, count)
                allowance.spend(start, count)
            return count

        back = self._first_put_back(prompts)
        its_turn = back is not None and self._turn >= TURN_STEPS - 1
        if back is not None and its_turn:
            line = itertools.chain((back,), (s for s in line if s is not back))
        admitting = not preempted and self._claim_has_room()
        slots = True  # False: somebody waits for an adapter's slot, and nobody who needs one overtakes
        for sequence in line:
            if budget == 0:
                break
            if sequence.status is Status.WAITING:
                if not admitting or not allowance.open:
                    continue
                if sequence.spec.adapter:
                    slots = slots and groups.has_slot(sequence)
                    if not slots:
                        continue
                if self._crowded_for(sequence) or not self._admit(sequence):
                    if self.searches.passes(sequence):
                        continue
                    admitting = False  # it waits for room; nobody that waits too overtakes it
                    if its_turn and sequence is back and not sequence.leads:
                        self._claim = sequence
                    continue
            budget -= plan_prompt(sequence)
        if back is not None and len(planned) > decodes:
            self._turn = 0 if its_turn else self._turn + 1
        if not planned and groups.leaving and len(self.running) > 1 and not ahead:
            self._preempt(self.running[-1])  # prompts that have begun hold what each of them waits for
            return self.schedule(now)

        for number, proposed in drafts.items():
            budget -= self._make_room(planned[number][0], proposed, budget)
        work: Mapping[int, DraftWork] = {}
        if self._speculation is not None and decoding:
            work = self._speculation.work(decoding, drafts)
        return [
            (sequence, self._item(sequence, count, place, drafts.get(number, ()), work.get(number)))
            for place, (number, (sequence, count)) in enumerate(planned.items())
        ]

    def _review(self, now: float, decodes: int, context_tokens: int) -> None:
        """Who is put back, as things stand."""
        if now < self._review_at:
            return
        self._review_at = now + _REVIEW_S
        budget = self._chunk_budget
        prompts = sorted([*(s for s in self.running if s.remaining > 1), *self.waiting], key=_by_turn)
        back: set[int] = set()
        if any(s.may_be_put_back for s in prompts):
            stretch = budget.stretch(decodes, context_tokens, self._limits.max_batch_tokens)
            needs: list[Need] = []
            for s in prompts:
                done = s.num_computed + s.in_flight or s.found_tokens
                left_s = budget.prompt_ms(done, len(s.tokens) - done) * stretch / 1e3
                due_at = s.due_at if s.may_be_put_back else math.inf
                needs.append(Need(due_at, left_s, s.spec.priority, s.spec.put_back_weight))
            back = {prompts[i].sequence_id for i in put_back(needs, now)}
        changed = False
        for s in itertools.chain(self.running, self.waiting):
            if s.put_back != (s.sequence_id in back):
                s.put_back = not s.put_back
                changed = True
        if changed:
            self.running.sort(key=_by_order)
            self.waiting.sort(key=_by_order)
        self._look_again()

    def _look_again(self) -> None:
        """What the cache holds of a put-back prompt may have grown since it came; one at a time, in turns."""
        first = bisect.bisect_left(self.waiting, True, key=_is_put_back)
        if first < len(self.waiting):
            self._looks += 1
            self._find(self.waiting[first + self._looks % (len(self.waiting) - first)])

    def _find(self, sequence: Sequence) -> None:
        block_tokens = self._limits.block_tokens
        names = self._findable(sequence)
        sequence.found_tokens = self._groups.find(names).blocks * block_tokens

    def _findable(self, sequence: Sequence) -> list[bytes]:
        """Names of the blocks that it may take from the prefix cache."""
        if sequence.wants_prompt:
            return []
        return sequence.name_blocks(len(sequence.tokens) - 1, self._limits.block_tokens)

    def _first_put_back(self, prompts: list[Sequence]) -> Sequence | None:
        """Of those at the back the one whose turn is next; None if there is none, or nobody before it."""
        ahead, first = False, None
        for queue in (prompts, self.waiting):
            at = bisect.bisect_left(queue, True, key=_is_put_back)
            ahead = ahead or at > 0
            if at < len(queue) and (first is None or queue[at].order < first.order):
                first = queue[at]
        return first if ahead else None

    def _claim_has_room(self) -> bool:
        """False while one whose turn has come waits for room: nobody else may begin."""
        claim = self._claim
        if claim is None:
            return True
        wanted = claim.status is Status.WAITING and claim.put_back
        if wanted and (self._crowded_for(claim) or not self._admit(claim)):
            return False
        self._claim = None
        return True

    def _last_chunk(self, sequence: Sequence, budget: int) -> int:
        """How many tokens to compute now of a prompt that has the worker to itself.

        The KV of a prompt's last chunk is all that a reader still has to wait for after the first token, so the last
        chunk of a prompt that will be handed over is halved while that leaves a fair amount of work for a step. Beside
        other prompts it is not: each of its steps would be as long as theirs.
        """
        count = min(sequence.remaining, budget)
        if sequence.spec.hand_over and count == sequence.remaining and count >= 2 * _LAST_CHUNK_TOKENS:
            block_tokens = self._limits.block_tokens
            start = sequence.num_computed + sequence.in_flight
            end = start + count // 2
            count = max(_LAST_CHUNK_TOKENS, end - end % block_tokens - start)
        return count

    def _grow(self, sequence: Sequence) -> bool:
        """Room for all known tokens of a running sequence, and for one that is coming."""
        return self._groups.grow(sequence, sequence.num_foreseen)

    def _make_room(self, sequence: Sequence, drafts: list[int], budget: int) -> int:
        """Of `drafts` there stay as many as `budget` and blocks leave room for, which it returns."""
        del drafts[budget:]
        if drafts and not self._groups.grow(sequence, sequence.num_foreseen + len(drafts)):
            drafts.clear()
        return len(drafts)

    def _admit(self, sequence: Sequence) -> bool:
        """Waiting to running: cached prefix plus fresh blocks for the rest, all or nothing.

        At least one token is left to compute: its logits are what the sequence needs.
        """
        search = sequence.search
        if search is not None and not self._groups.has_free(search.blocks):
            return False
        hit = self._groups.find(self._findable(sequence))
        if search is not None and not self._groups.has_room(sequence, hit, search.blocks):
            return False  # before anything is taken: that would end what is cached, at each try
        if not self._groups.admit(sequence, hit):
            return False
        if search is not None and not search.reserve():
            self._groups.release(sequence)
            sequence.num_computed = sequence.num_published = 0
            return False
        self.waiting.remove(sequence)
        self.searches.left(sequence)
        if sequence.sampled_here == 0:  # a preempted sequence's second look is not the client's cache hit
            sequence.cached_tokens = min(sequence.num_computed, sequence.num_prompt)
        self.enroll(sequence)
        return True

    def _crowded_for(self, sequence: Sequence) -> bool:
        taken = sum(s.places for s in self.running)
        return taken + sequence.places > self._limits.max_running_sequences

    def _preempt(self, sequence: Sequence) -> list[Sequence]:
        """Returns all that lose their blocks by it."""
        self.preemptions_total += 1
        search, losers = sequence.search, [sequence]
        if search is not None:  # it begins again whole: beams alone would wait for each other
            losers = [s for s in self.running if s.search is search]
            sequence = next(s for s in losers if s.leads)
            self.end_search(sequence)
        self.begin_again(sequence)
        return losers

    def step_search(self, search: Searching, sequence: Sequence, logprobs: TokenLogprobs) -> bool:
        """A row of it. True: the search is over."""
        before, news = search.beams, search.take(sequence, logprobs)
        for beam in before:
            if beam.status is Status.FINISHED:
                self.remove(beam)
        for beam in news or ():
            self.enroll(beam)
        return news is None

    def end_search(self, leader: Sequence) -> None:
        """Its beams are gone, and what it has taken for them."""
        search = leader.search
        if search is not None:
            for beam in search.beams:
                self.remove(beam)
            search.release()

    def begin_again(self, sequence: Sequence) -> None:
        """A running sequence loses its blocks and waits to be computed anew."""
        self.running.remove(sequence)
        self._groups.release(sequence)
        sequence.lose_blocks()
        self.enqueue(sequence)

    def _item(
        self, sequence: Sequence, count: int, place: int, drafts: Items[int] = (), work: DraftWork | None = None
    ) -> PlanItem:
        sampling = sequence.spec.sampling
        start = sequence.num_computed + sequence.in_flight
        end = start + count
        scored = sampling.prompt_logprobs
        if scored is not None and (sequence.num_emitted or start + 1 >= sequence.num_prompt):
            scored = None
        follows = sequence.place if end > len(sequence.tokens) else None
        token_ids = sequence.tokens[start:end] if follows is None else (TO_COME,)
        item = PlanItem(
            sequence_id=sequence.sequence_id,
            token_ids=[*token_ids, *drafts] if drafts else token_ids,
            start=start,
            block_ids=sequence.block_ids,
            sample=end == sequence.num_foreseen,
            position=sequence.num_emitted + sequence.coming,
            sampling=sampling,
            prompt_len=sequence.num_prompt,
            history=sequence.tokens,
            matcher=sequence.spec.matcher,
            follows=follows,
            others=sequence.tables[1:],
            state=self._groups.use_of_state(sequence, start, count, prompt=count > 1),
            long=sequence.long,
            drafts=drafts,
            draft=work,
            adapter=sequence.adapter,
            prompt_logprobs=scored,
            copies=sequence.copies,
        )
        sequence.copies = ()
        sequence.plan(count + len(drafts), place, self._limits.context_limit_tokens)
        return item


def _by_order(sequence: Sequence) -> tuple[bool, int, float, int]:
    return sequence.order


def _by_turn(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.turn


def _is_put_back(sequence: Sequence) -> bool:
    return sequence.put_back
