"""Beam searches among an engine's sequences (engine/beams.py has the rule).

    leader    the sequence that was asked for. It computes the prompt, then stands with its blocks until the end
    beams     sequences of the engine's own, with numbers below 0; each step computes one token of each

    leader's row ── rule ──> beams: share the leader's whole blocks, copy what is in its last one
    a row of every beam ── rule ──> a beam's first continuation goes on in it; further ones are new beams, which share
                                    its whole blocks and copy its last one; one without any ends, its blocks come free
    over ──> answers, whole; the leader ends, and everything with it

The blocks that the search may come to need are taken with the prompt's, all or nothing, as are its places among the
running sequences: so it never waits for room while it holds some, and takes none from others. Who needs room and goes
first may take it from the search, which then begins again as a waiting prompt. Nothing of it has left, so nobody sees.

Nothing but the prompt is published in the prefix cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

from engine.beams import BeamAnswer, BeamRule
from engine.kv_groups import KvGroups, blocks_for
from engine.scheduler import EngineLimits
from engine.sequence import Sequence, Status
from engine.types import SequenceSpec
from kv_transfer.handoff import TokenLogprobs
from kv_transfer.layout import GONE

MAX_ENDS = 64  # tokens that end an answer; each widens every row's candidates by one

_numbers = itertools.count(1)


def blocks_of_search(spec: SequenceSpec, limits: EngineLimits) -> int:
    """That the beams may need beside the prompt's whole blocks, in each group."""
    assert spec.beams is not None
    size, prompt = limits.block_tokens, len(spec.prompt)
    longest = min(prompt + spec.sampling.max_tokens, limits.context_limit_tokens)
    return spec.beams.width * (blocks_for(longest, size) - prompt // size)


class Search:
    """Of one leader. Owns the beams, and the blocks that are taken for them and not in use."""

    def __init__(self, spec: SequenceSpec, limits: EngineLimits, groups: KvGroups) -> None:
        assert spec.beams is not None
        self._params = spec.beams
        self._limits = limits
        self._groups = groups
        self._most = min(spec.sampling.max_tokens, limits.context_limit_tokens - len(spec.prompt))
        self._spec = spec
        self.blocks = blocks_of_search(spec, limits)
        self._free: list[list[int]] = [[] for _ in groups.rules]
        self.beams: list[Sequence] = []
        self.rows: dict[Sequence, tuple[tuple[int, float], ...]] = {}
        self.rule = self._new_rule()
        self.sampling = replace(
            spec.sampling,
            temperature=0.0,
            min_tokens=0,
            stop_token_ids=frozenset(),
            logprobs=min(self.rule.candidates, limits.vocab_size),
        )

    def _new_rule(self) -> BeamRule:
        sampling = self._spec.sampling
        return BeamRule(self._params, sampling.stop_token_ids, sampling.min_tokens, self._most)

    @property
    def width(self) -> int:
        return self._params.width

    @property
    def leader(self) -> int:
        """Its number."""
        return self._spec.sequence_id

    def reserve(self) -> bool:
        """All blocks that the beams may need, or none."""
        for group in range(len(self._groups.rules)):
            taken = self._groups.pool.allocate(self.blocks, group)
            if taken is None:
                self.release()
                return False
            self._free[group] = taken
        return True

    def release(self) -> None:
        """Everything but the leader's; the search is as before its first step."""
        for beam in self.beams:
            self._end(beam)
        self.beams = []
        self.rows = {}
        for blocks in self._free:
            self._groups.pool.unpin(blocks)
            blocks.clear()
        self.rule = self._new_rule()

    def held(self) -> Iterable[int]:
        """Blocks that are taken and not in use."""
        return itertools.chain.from_iterable(self._free)

    def take(self, sequence: Sequence, logprobs: TokenLogprobs) -> list[Sequence] | None:
        """A row of the leader, or of a beam. Returns new beams to be run, when all rows of a step are there; None: the
        search is over.
        """
        if sequence.leads:
            parents = [sequence]
        else:
            parents = self.beams
            sequence.ending = False
        self.rows[sequence] = logprobs.top
        if len(self.rows) < len(parents):
            return []
        grown = self.rule.step([self.rows[parent] for parent in parents])
        self.rows = {}
        if not grown:
            return None
        first = {beam: place for place, (beam, _) in reversed(list(enumerate(grown)))}
        leads = parents is not self.beams
        for number, parent in enumerate(parents):
            if number not in first and not leads:
                self._end(parent)
        beams: list[Sequence] = []
        news: list[Sequence] = []
        for place, (number, token) in enumerate(grown):
            parent = parents[number]
            if leads or first[number] != place:
                news.append(self._fork(parent, token))
                beams.append(news[-1])
            else:
                beams.append(parent)
        for place, (number, token) in enumerate(grown):
            if not leads and first[number] == place:
                self._extend(parents[number], token)
        self.beams = beams
        return news

    def answers(self) -> tuple[BeamAnswer, ...]:
        return self.rule.answers()

    def _fork(self, parent: Sequence, token: int) -> Sequence:
        size = self._limits.block_tokens
        stands = len(parent.tokens)
        assert parent.num_computed == stands
        whole = stands // size
        tables: list[list[int]] = []
        copies: list[tuple[int, int]] = []
        for group, table in enumerate(parent.tables):
            shared = table[:whole]
            self._groups.pool.pin([block for block in shared if block != GONE])
            last = self._free[group].pop()
            if stands % size:
                copies.append((table[whole], last))
            tables.append([*shared, last])
        return Sequence(
            spec=replace(self._spec, sequence_id=-next(_numbers), beams=None, sampling=self.sampling),
            arrival=parent.arrival,
            parent=parent.parent,
            status=Status.RUNNING,
            tokens=[*parent.tokens, token],
            num_prompt=parent.num_prompt,
            due_at=parent.due_at,
            num_computed=stands,
            num_published=whole,
            tables=tables,
            sampled_here=1,
            adapter=parent.adapter,
            long=parent.long,
            search=self,
            copies=tuple(copies),
        )

    def _extend(self, beam: Sequence, token: int) -> None:
        if len(beam.tokens) % self._limits.block_tokens == 0:
            for group, table in enumerate(beam.tables):
                table.append(self._free[group].pop())
        beam.tokens.append(token)

    def _end(self, beam: Sequence) -> None:
        """Of its blocks those that nobody shares are free for other beams."""
        pool = self._groups.pool
        for free, table in zip(self._free, beam.tables, strict=True):
            for block in reversed(table):
                if block == GONE:
                    continue
                if pool.references(block) == 1:
                    free.append(block)
                else:
                    pool.unpin((block,))
        beam.tables = [[] for _ in beam.tables]
        beam.adapter = None
        beam.status = Status.FINISHED
        beam.lives += 1
