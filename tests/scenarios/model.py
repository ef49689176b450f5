"""A scripted model: every right token is known, and KV carries where it came from.

The mark of a token is a mix of everything before it. A KV slot holds its token's mark, and the next token follows from
the mark, so a wrong, stale or foreign slot is caught when it is read, not when an answer looks odd. In every group of
the layout what its rule looks at must be there; a state is the mark of the last token before. With `original` longer
sequences have another rotary table, whose slots are no good for shorter ones, nor the other way round.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.types import PlanItem, Sampled, SamplingParams, StepPlan, StepResult
from kv_transfer.handoff import TokenLogprobs
from kv_transfer.layout import FULL, Rule
from kv_transfer.transport import KvArea, KvMemory

VOCABULARY = 997  # also what no model says
_MASK = (1 << 64) - 1
_LONG = 0x5A5A << 32  # what another rotary table makes of a mark


class WrongKv(AssertionError):
    """A sequence was about to attend to KV that is not its own."""


def mix(mark: int, value: int) -> int:
    """splitmix64 of the running mark and a value. Never 0."""
    z = (mark + 0x9E3779B97F4A7C15 * (value + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) | 1


def first_mark(adapter: str) -> int:
    """Before the first token: with an adapter everything is another."""
    return mix(0, zlib.crc32(adapter.encode())) if adapter else 0


def next_token(mark: int, temperature: float, seed: int, position: int, penalised: Sequence[int] = ()) -> int:
    """Greedy follows from the history alone, sampling also from (seed, position), penalties from how often the answer's
    tokens were in it (`penalised`).
    """
    if penalised:
        mark = mix(mark, sum(mix(1, token) for token in penalised) & _MASK)
    return (mark if temperature == 0 else mix(mix(mark, seed), position)) % VOCABULARY


def expected_answer(
    prompt: Sequence[int],
    temperature: float,
    seed: int,
    max_tokens: int,
    min_tokens: int,
    stops: frozenset[int],
    *,
    penalised: bool = False,
    adapter: str = "",
) -> list[int]:
    """What an undisturbed engine answers."""
    mark = first_mark(adapter)
    for token in prompt:
        mark = mix(mark, token)
    answer: list[int] = []
    while True:
        token = next_token(mark, temperature, seed, len(answer), answer if penalised else ())
        answer.append(token)
        mark = mix(mark, token)
        if (token in stops and len(answer) > min_tokens) or len(answer) >= max_tokens:
            return answer


def expected_logprobs(token: int) -> TokenLogprobs:
    """Exact in the wire's float32."""
    return TokenLogprobs(-token / 8, ((token, -token / 8),))


def row_of(mark: int, words: int = 12) -> tuple[tuple[int, float], ...]:
    """Of a beam search: tokens and log-probabilities, best first."""
    values = np.random.default_rng(mark).normal(size=words).astype(np.float32) * 2
    values -= np.float32(np.log(np.exp(values).sum()))
    return tuple((token, float(values[token])) for token in np.argsort(-values).tolist())


Launch = list[tuple[PlanItem, list[list[int]], list[int]]]  # with tables and history as they were


class ScriptedModel:
    searches = False  # rows are those of beam searches

    def __init__(
        self, num_blocks: Sequence[int], block_tokens: int, rules: Sequence[Rule] = (FULL,), original: int = 0
    ) -> None:
        """`num_blocks`: by group."""
        self._original = original
        self.block_tokens = block_tokens
        self.rules = tuple(rules)
        self._blocks = tuple(num_blocks)
        self.kv = np.zeros((sum(num_blocks), block_tokens), dtype=np.uint64)
        self.generations = np.zeros(sum(num_blocks), dtype=np.uint64)
        self._marks: dict[int, list[int]] = {}
        self.first: tuple[Any, ...] = ()  # as AdapterLayers
        self.takes_more = True
        self._adapters: set[str] = set()

    def add(self, adapter: Any, pairs: Any) -> None:
        self._adapters.add(adapter.digest)

    def drop(self, digest: str) -> None:
        self._adapters.discard(digest)

    def memory(self) -> KvMemory:
        return KvMemory(
            areas=tuple(
                KvArea(self.kv.ctypes.data + first * self.block_tokens * 8, self.block_tokens * 8, count)
                for first, count in zip(itertools.accumulate(self._blocks, initial=0), self._blocks, strict=False)
            ),
            device="cpu",
            generations=self.generations,
            read_block=lambda i: memoryview(self.kv[i]).cast("B"),
        )

    def digest(self, block: int) -> int:
        mark = 0
        for value in self.kv[block].tolist():
            mark = mix(mark, value)
        return mark

    def execute(self, plan: StepPlan) -> StepResult:
        return self.run(self.launch(plan), None)

    def launch(self, plan: StepPlan) -> Launch:
        """What a step will work on is fixed here; `run` is when it does."""
        slots: dict[int, str] = {}
        for item in plan.items:
            if item.adapter is not None:
                slot, digest = item.adapter
                assert digest in self._adapters, f"sequence {item.sequence_id}: adapter {digest} is not there any more"
                assert slots.setdefault(slot, digest) == digest, f"two adapters in slot {slot}"
        return [
            (item, [list(table) for table in (item.block_ids, *item.others)], list(item.history)) for item in plan.items
        ]

    def run(self, launch: Launch, before: StepResult | None, *, surplus: bool = False) -> StepResult:
        """`before`: of the step before, whose tokens some items follow. `surplus`: rows of sequences that have ended
        may be among them, and find others' KV in their blocks: they give a wrong token, which nobody may see.
        """
        for source, target in [pair for item, _, _ in launch for pair in item.copies]:
            self.kv[target] = self.kv[source]
        tokens = []
        further: dict[int, list[Sampled]] = {}
        for place, (item, tables, history) in enumerate(launch):
            if item.follows is not None:
                assert before is not None
                token = before.token_ids[item.follows]
                assert token is not None
                history = [*history[: item.start], token]
            tokens.append(self._run(item, tables, history, surplus))
            if item.drafts:
                accepted = self._verify(item, history, tokens[-1])
                further[place] = [
                    (token, None if item.sampling.logprobs is None else expected_logprobs(token)) for token in accepted
                ]
        logprobs = tuple(
            None if token is None or item.sampling.logprobs is None else expected_logprobs(token)
            for token, (item, _, _) in zip(tokens, launch, strict=True)
        )
        if self.searches:
            logprobs = tuple(
                None
                if token is None or item.sampling.logprobs is None
                else TokenLogprobs(0.0, row_of(self._marks[item.sequence_id][len(history) - 1]))
                for token, (item, _, history) in zip(tokens, launch, strict=True)
            )
        return StepResult(tuple(tokens), logprobs, further=further)

    def foretell(
        self, tokens: Sequence[int], sampling: SamplingParams, num_prompt: int, count: int, adapter: str = ""
    ) -> list[int]:
        """What it is going to say."""
        mark = first_mark(adapter)
        for token in tokens:
            mark = mix(mark, token)
        answer = list(tokens[num_prompt:])
        for _ in range(count):
            penalised = answer if sampling.penalised else ()
            answer.append(self._sample(mark, sampling, len(answer), penalised))
            mark = mix(mark, answer[-1])
        return answer[len(tokens) - num_prompt :]

    def _verify(self, item: PlanItem, history: list[int], said: int | None) -> list[int]:
        """The tokens after the first that it has said, as long as they are the drafts."""
        mark = self._marks[item.sequence_id][len(history) - 1]
        answer = history[item.prompt_len :]
        found: list[int] = []
        for i, draft in enumerate(item.drafts, 1):
            if draft != said:
                break
            mark = mix(mark, draft)
            answer = [*answer, draft]
            penalised = answer if item.sampling.penalised else ()
            said = self._sample(mark, item.sampling, item.position + i, penalised)
            found.append(said)
        return found

    def _run(self, item: PlanItem, tables: list[list[int]], history: list[int], surplus: bool) -> int | None:
        if item.long != (0 < self._original < len(history)):
            raise WrongKv(f"sequence {item.sequence_id}, {len(history)} tokens: the wrong rotary table")
        marks = self._marks.setdefault(item.sequence_id, [])
        mark = marks[-1] if marks else first_mark("" if item.adapter is None else item.adapter.digest)
        for token in history[len(marks) :]:
            mark = mix(mark, token)
            marks.append(mark)
        end = item.start + len(item.token_ids)
        wrong = ""
        kept = [mark ^ _LONG for mark in marks] if item.long else marks
        if item.drafts:
            kept, mark = kept[: len(history)], marks[len(history) - 1]
            for draft in item.drafts:
                mark = mix(mark, draft)
                kept.append(mark ^ _LONG if item.long else mark)
        for rule, table in zip(self.rules, tables, strict=True):
            wrong = wrong or (self._state(item, kept) if rule.state else self._blocks_of(item, rule, table, kept))
        if wrong and not surplus:
            raise WrongKv(f"sequence {item.sequence_id}: {wrong} is not its own")
        if not item.sample:
            return None
        penalised = history[item.prompt_len :] if item.sampling.penalised else ()
        token = self._sample(marks[end - len(item.drafts) - 1], item.sampling, item.position, penalised)
        return (token + 1) % VOCABULARY if wrong else token

    def _blocks_of(self, item: PlanItem, rule: Rule, table: list[int], marks: list[int]) -> str:
        """Writes the new tokens; says which of those before them that the rule looks at is wrong."""
        size, start = self.block_tokens, item.start
        first = rule.first(start)
        for i in range(start, start + len(item.token_ids)):
            assert table[i // size] >= 0, "a step writes into a block that was left"
            self.kv[table[i // size], i % size] = marks[i]
        looked_at = self.kv[table[first // size : -(-start // size)]].reshape(-1)[first % size :][: start - first]
        wrong = np.flatnonzero(looked_at != np.array(marks[first:start], dtype=np.uint64))
        if min(table[first // size : -(-start // size)], default=0) < 0:
            return f"what the {rule} group has left of token {first} on"
        if not len(wrong):
            return ""
        at = first + int(wrong[0])
        return f"the KV of token {at} (block {table[at // size]}, {rule})"

    def _state(self, item: PlanItem, marks: list[int]) -> str:
        use, start = item.state, item.start
        assert use is not None
        found = 0 if use.source < 0 else int(self.kv[use.source, 0])
        assert len({use.source, use.target, use.snapshot}) == 3 or (use.source == use.snapshot == -1)
        self.kv[use.target, 0] = marks[start + len(item.token_ids) - 1]
        if use.snapshot_after:
            self.kv[use.snapshot, 0] = marks[start + use.snapshot_after - 1]
        return "" if found == (marks[start - 1] if start else 0) else f"the state before token {start} ({use})"

    @staticmethod
    def _sample(mark: int, sampling: SamplingParams, position: int, penalised: Sequence[int]) -> int:
        return next_token(mark, sampling.temperature, sampling.seed, position, penalised)
