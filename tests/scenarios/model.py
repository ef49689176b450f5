"""A scripted model: every right token is known, and KV carries where it came from.

The mark of a token is a mix of everything before it. A KV slot holds its token's mark, and the next token follows from
the mark, so a wrong, stale or foreign slot is caught when it is read, not when an answer looks odd.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.types import PlanItem, SamplingParams, StepPlan, StepResult
from kv_transfer.handoff import TokenLogprobs
from kv_transfer.transport import KvArea, KvMemory

VOCABULARY = 997
_MASK = (1 << 64) - 1


class WrongKv(AssertionError):
    """A sequence was about to attend to KV that is not its own."""


def mix(mark: int, value: int) -> int:
    """splitmix64 of the running mark and a value. Never 0."""
    z = (mark + 0x9E3779B97F4A7C15 * (value + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) | 1


def next_token(mark: int, temperature: float, seed: int, position: int) -> int:
    """Greedy follows from the history alone, sampling also from (seed, position)."""
    return (mark if temperature == 0 else mix(mix(mark, seed), position)) % VOCABULARY


def expected_answer(
    prompt: Sequence[int], temperature: float, seed: int, max_tokens: int, min_tokens: int, stops: frozenset[int]
) -> list[int]:
    """What an undisturbed engine answers."""
    mark = 0
    for token in prompt:
        mark = mix(mark, token)
    answer: list[int] = []
    while True:
        token = next_token(mark, temperature, seed, len(answer))
        answer.append(token)
        mark = mix(mark, token)
        if (token in stops and len(answer) > min_tokens) or len(answer) >= max_tokens:
            return answer


def expected_logprobs(token: int) -> TokenLogprobs:
    """Exact in the wire's float32."""
    return TokenLogprobs(-token / 8, ((token, -token / 8),))


Launch = list[tuple[PlanItem, list[int], list[int]]]  # with blocks and history as they were


class ScriptedModel:
    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.kv = np.zeros((num_blocks, block_tokens), dtype=np.uint64)
        self.generations = np.zeros(num_blocks, dtype=np.uint64)
        self._marks: dict[int, list[int]] = {}

    def memory(self) -> KvMemory:
        return KvMemory(
            areas=(KvArea(self.kv.ctypes.data, self.block_tokens * 8, len(self.kv)),),
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

    @staticmethod
    def launch(plan: StepPlan) -> Launch:
        """What a step will work on is fixed here; `run` is when it does."""
        return [(item, list(item.block_ids), list(item.history)) for item in plan.items]

    def run(self, launch: Launch, before: StepResult | None, *, surplus: bool = False) -> StepResult:
        """`before`: of the step before, whose tokens some items follow. `surplus`: rows of sequences that have ended
        may be among them, and find others' KV in their blocks: they give a wrong token, which nobody may see.
        """
        tokens = []
        for item, blocks, history in launch:
            if item.follows is not None:
                assert before is not None
                token = before.token_ids[item.follows]
                assert token is not None
                history = [*history[: item.start], token]
            tokens.append(self._run(item, blocks, history, surplus))
        logprobs = tuple(
            None if token is None or item.sampling.logprobs is None else expected_logprobs(token)
            for token, (item, _, _) in zip(tokens, launch, strict=True)
        )
        return StepResult(tuple(tokens), logprobs)

    def _run(self, item: PlanItem, blocks: list[int], history: list[int], surplus: bool) -> int | None:
        marks = self._marks.setdefault(item.sequence_id, [])
        mark = marks[-1] if marks else 0
        for token in history[len(marks) :]:
            mark = mix(mark, token)
            marks.append(mark)
        slots = self.kv[blocks].reshape(-1)
        start, end = item.start, item.start + len(item.token_ids)
        wrong = np.flatnonzero(slots[:start] != np.array(marks[:start], dtype=np.uint64))
        if len(wrong) and not surplus:
            at = int(wrong[0])
            block = blocks[at // self.block_tokens]
            raise WrongKv(f"sequence {item.sequence_id}: the KV of token {at} (block {block}) is not its own")
        for i in range(start, end):
            self.kv[blocks[i // self.block_tokens], i % self.block_tokens] = marks[i]
        if not item.sample:
            return None
        token = self._sample(marks[end - 1], item.sampling, item.position)
        return (token + 1) % VOCABULARY if len(wrong) else token

    @staticmethod
    def _sample(mark: int, sampling: SamplingParams, position: int) -> int:
        return next_token(mark, sampling.temperature, sampling.seed, position)
