"""A model whose every right token is known, and whose KV carries where it came from.

The next token is a hash of the whole history, so that a wrong token, position or block shows at once. "KV" of a token
is written into a numpy pool as the hash of the prefix up to it; reading a wrong or stale block gives a wrong answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from engine.types import SamplingParams, StepPlan, StepResult
from kv_transfer.transport import KvMemory

VOCABULARY = 1000


def prefix_mark(tokens: Sequence[int]) -> int:
    """What a right KV slot of the last token holds. Never 0."""
    data = np.asarray(tokens, dtype="<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") | 1


def next_token(mark: int, sampling: SamplingParams, position: int) -> int:
    """Greedy depends on the history alone; sampling also on (seed, position)."""
    if sampling.temperature == 0:
        return mark % VOCABULARY
    data = f"{mark}|{sampling.seed}|{position}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % VOCABULARY


def expected_answer(prompt: Sequence[int], sampling: SamplingParams, context_limit: int = 1 << 30) -> list[int]:
    """What an undisturbed engine answers."""
    history, answer = list(prompt), []
    while True:
        token = next_token(prefix_mark(history), sampling, len(answer))
        history.append(token)
        answer.append(token)
        if token in sampling.stop_token_ids and len(answer) > sampling.min_tokens:
            return answer
        if len(answer) >= sampling.max_tokens or len(history) >= context_limit:
            return answer


class ScriptedRunner:
    """Checks that the KV of every earlier token stands where the block table says, then writes its own."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.kv = np.zeros((num_blocks, block_tokens), dtype=np.uint64)
        self.generations = np.zeros(num_blocks, dtype=np.uint64)
        self.steps = 0

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * 8

    def memory(self) -> KvMemory:
        return KvMemory(
            base_address=self.kv.ctypes.data,
            block_bytes=self.block_bytes,
            num_blocks=len(self.kv),
            device="cpu",
            generations=self.generations,
            read_block=lambda i: memoryview(self.kv[i]).cast("B"),
        )

    def execute(self, plan: StepPlan) -> StepResult:
        self.steps += 1
        tokens: list[int | None] = []
        for item in plan.items:
            history = list(item.history)
            end = item.start + len(item.token_ids)
            assert list(item.token_ids) == history[item.start : end]
            for i in range(item.start):
                found = int(self.kv[item.block_ids[i // self.block_tokens], i % self.block_tokens])
                assert found == prefix_mark(history[: i + 1]), (
                    f"sequence {item.sequence_id}: the KV of token {i} is wrong"
                )
            for i in range(item.start, end):
                self.kv[item.block_ids[i // self.block_tokens], i % self.block_tokens] = prefix_mark(history[: i + 1])
            tokens.append(next_token(prefix_mark(history), item.sampling, item.position) if item.sample else None)
        return StepResult(tuple(tokens), (None,) * len(tokens))
