"""Which sequences compute which tokens in the next step.

No phases: every sequence catches up `num_computed` with its tokens, at most `max_batch_tokens` of all in one step.

    1. running sequences one token behind (decodes), by order
    2. running sequences further behind (chunks of prompts), by order
    3. waiting sequences, by order, while there are blocks for all their known tokens

Beside decodes, 2 and 3 get what engine/chunk_budget.py allows.

A step may be planned while the one before it computes (`ahead`). A sequence that samples there takes part with a token
that is still to come. What is short of blocks then waits until that step's ends are known, rather than take them from
others.

Order is priority, then arrival. When a decode finds no block, the last sequence by order gives way: it loses its
blocks, goes back to waiting and is computed again (mostly from the prefix cache). A waiting sequence never takes
blocks from a running one, so nothing moves in circles: the first by order always gets on.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.chunk_budget import ChunkBudget
from engine.sequence import Sequence, Status
from engine.types import TO_COME, PlanItem

_LAST_CHUNK_TOKENS = 128


@dataclass(frozen=True, slots=True)
class EngineLimits:
    block_tokens: int
    max_batch_tokens: int
    max_running_sequences: int
    max_waiting_sequences: int
    context_limit_tokens: int
    vocab_size: int
    itl_target_ms: float | None = None  # None: prompts do not make way for decodes

    def __post_init__(self) -> None:
        if self.max_running_sequences > self.max_batch_tokens:
            raise ValueError(
                f"max_running_sequences ({self.max_running_sequences}) exceeds max_batch_tokens "
                f"({self.max_batch_tokens}): every running sequence needs a token a step; lower the first"
            )


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    return -(-num_tokens // block_tokens)


class Scheduler:
    """Owns the waiting and running queues. Blocks change hands only here and in EngineCore."""

    def __init__(self, limits: EngineLimits, pool: BlockPool, chunk_budget: ChunkBudget) -> None:
        self._limits = limits
        self._pool = pool
        self._chunk_budget = chunk_budget
        self.waiting: list[Sequence] = []  # sorted by order
        self.running: list[Sequence] = []  # sorted by order
        self.preemptions_total = 0

    def enqueue(self, sequence: Sequence) -> None:
        """To waiting. It holds no blocks there."""
        assert not sequence.block_ids
        sequence.status = Status.WAITING
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def enroll(self, sequence: Sequence) -> None:
        """To running, with its blocks (received KV)."""
        sequence.status = Status.RUNNING
        bisect.insort(self.running, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        queue = self.waiting if sequence.status is Status.WAITING else self.running
        queue.remove(sequence)

    def schedule(self, *, ahead: bool = False) -> list[tuple[Sequence, PlanItem]]:
        planned: dict[int, tuple[Sequence, int]] = {}  # sequence id -> tokens to compute
        budget = self._limits.max_batch_tokens
        preempted = False

        for sequence in [s for s in self.running if s.remaining == 1]:
            if sequence.status is not Status.RUNNING:
                continue  # gave way to an earlier one in this loop
            while not self._grow(sequence):
                if ahead:
                    return []
                victim = self.running[-1]
                freed = planned.pop(victim.sequence_id, None)
                budget += freed[1] if freed else 0
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            if sequence.status is Status.RUNNING and budget > 0:
                planned[sequence.sequence_id] = (sequence, 1)
                budget -= 1

        context_tokens = sum(sequence.num_foreseen for sequence, _ in planned.values())
        allowance = self._chunk_budget.allowance(len(planned), context_tokens)

        def plan_prompt(sequence: Sequence) -> int:
            start = sequence.num_computed + sequence.in_flight
            count = self._chunk(sequence, min(budget, allowance.tokens(start)))
            if count > 0:
                planned[sequence.sequence_id] = (sequence, count)
                allowance.spend(start, count)
            return count

        for sequence in [s for s in self.running if s.remaining > 1]:
            if budget == 0:
                break
            budget -= plan_prompt(sequence)

        while self.waiting and budget > 0 and allowance.open and not preempted:
            if len(self.running) >= self._limits.max_running_sequences:
                break
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break  # the first in line waits for room; nobody overtakes it
            budget -= plan_prompt(sequence)

        return [
            (sequence, self._item(sequence, count, place)) for place, (sequence, count) in enumerate(planned.values())
        ]

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """How many tokens of a prompt to compute now.

        The KV of a prompt's last chunk is all that a reader still has to wait for after the first token, so the last
        chunk of a prompt that will be handed over is halved while that leaves a fair amount of work for a step.
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
        missing = blocks_for(sequence.num_foreseen, self._limits.block_tokens) - len(sequence.block_ids)
        if missing <= 0:
            return True
        blocks = self._pool.allocate(missing)
        if blocks is None:
            return False
        sequence.block_ids += blocks
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Waiting to running: cached prefix plus fresh blocks for the rest, all or nothing.

        At least one token is left to compute: its logits are what the sequence needs.
        """
        block_tokens = self._limits.block_tokens
        cached = self._pool.match(sequence.name_blocks(len(sequence.tokens) - 1, block_tokens))
        self._pool.pin(cached)
        fresh = self._pool.allocate(blocks_for(len(sequence.tokens), block_tokens) - len(cached))
        if fresh is None:
            self._pool.unpin(reversed(cached))
            return False
        self.waiting.pop(0)
        sequence.block_ids = cached + fresh
        sequence.num_computed = len(cached) * block_tokens
        sequence.num_published = len(cached)
        if sequence.sampled_here == 0:  # a preempted sequence's second look is not the client's cache hit
            sequence.cached_tokens = min(sequence.num_computed, sequence.num_prompt)
        self.enroll(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions_total += 1
        self.running.remove(sequence)
        self._pool.unpin(reversed(sequence.block_ids))
        sequence.lose_blocks()
        self.enqueue(sequence)

    def _item(self, sequence: Sequence, count: int, place: int) -> PlanItem:
        start = sequence.num_computed + sequence.in_flight
        end = start + count
        follows = sequence.place if end > len(sequence.tokens) else None
        item = PlanItem(
            sequence_id=sequence.sequence_id,
            token_ids=sequence.tokens[start:end] if follows is None else (TO_COME,),
            start=start,
            block_ids=sequence.block_ids,
            sample=end == sequence.num_foreseen,
            position=sequence.num_emitted + sequence.coming,
            sampling=sequence.spec.sampling,
            prompt_len=sequence.num_prompt,
            history=sequence.tokens,
            matcher=sequence.spec.matcher,
            follows=follows,
        )
        sequence.plan(count, place, self._limits.context_limit_tokens)
        return item
