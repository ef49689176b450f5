"""A model whose every right token is known, and whose KV carries where it came from.

The next token is a hash of the whole history, so that a wrong token, position or block shows at once. "KV" of a token
is written into a numpy pool as the hash of the prefix up to it; reading a wrong or stale block gives a wrong answer.
With `original` sequences of more tokens have another rotary table, so other KV (engine/longrope.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from engine.scheduler import EngineLimits
from engine.types import TO_COME, PlanItem, Sampled, SamplingParams, StepPlan, StepResult
from kv_transfer.handoff import TokenLogprobs
from kv_transfer.transport import KvArea, KvMemory

VOCABULARY = 1000
WRONG = VOCABULARY + 1  # what comes of a wrong KV slot
_LONG = 0x5A5A  # another table's mark


def small_limits(block_tokens: int, **other: int) -> EngineLimits:
    values = {
        "block_tokens": block_tokens,
        "max_batch_tokens": 16,
        "max_running_sequences": 8,
        "max_waiting_sequences": 64,
        "context_limit_tokens": 100,
        "vocab_size": VOCABULARY,
    }
    return EngineLimits(**(values | other))


def prefix_mark(tokens: Sequence[int]) -> int:
    """Of the last token; what its KV slot holds, where there is one rotary table. Never 0."""
    data = np.asarray(tokens, dtype="<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") | 1


def kv_mark(tokens: Sequence[int], *, long: bool) -> int:
    """What a right KV slot of the last token holds."""
    return prefix_mark(tokens) ^ (_LONG if long else 0)


def next_token(mark: int, sampling: SamplingParams, position: int, words: int = VOCABULARY) -> int:
    """Greedy depends on the history alone; sampling also on (seed, position). With few `words` answers repeat
    themselves.
    """
    if sampling.temperature == 0:
        return mark % words if words == VOCABULARY else (mark >> 8) % words  # marks are odd
    data = f"{mark}|{sampling.seed}|{position}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % words


def expected_answer(
    prompt: Sequence[int], sampling: SamplingParams, context_limit: int = 1 << 30, words: int = VOCABULARY
) -> list[int]:
    """What an undisturbed engine answers."""
    history, answer = list(prompt), []
    while True:
        token = next_token(prefix_mark(history), sampling, len(answer), words)
        history.append(token)
        answer.append(token)
        if token in sampling.stop_token_ids and len(answer) > sampling.min_tokens:
            return answer
        if len(answer) >= sampling.max_tokens or len(history) >= context_limit:
            return answer


def likeliest(history: Sequence[int], words: int = 12) -> tuple[tuple[int, float], ...]:
    """Tokens and log-probabilities, best first: what a row of a beam search is."""
    values = np.random.default_rng(prefix_mark(history)).normal(size=words).astype(np.float32) * 2
    values -= np.float32(np.log(np.exp(values).sum()))
    return tuple((token, float(values[token])) for token in np.argsort(-values).tolist())


class ScriptedRunner:
    """Checks that the KV of every earlier token stands where the block table says, then writes its own."""

    def __init__(self, num_blocks: int, block_tokens: int, original: int = 0, words: int = VOCABULARY) -> None:
        self.block_tokens = block_tokens
        self.words = words
        self.original = original
        self.long_rows = 0
        self.kv = np.zeros((num_blocks, block_tokens), dtype=np.uint64)
        self.generations = np.zeros(num_blocks, dtype=np.uint64)
        self.steps = 0
        self.wrong_rows = 0
        self.searches = False
        self._last: ScriptedStep | None = None

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * 8

    @property
    def block_bytes_by_group(self) -> tuple[int, ...]:
        return (self.block_bytes,)

    def memory(self) -> KvMemory:
        return KvMemory(
            areas=(KvArea(self.kv.ctypes.data, self.block_bytes, len(self.kv)),),
            device="cpu",
            generations=self.generations,
            read_block=lambda i: memoryview(self.kv[i]).cast("B"),
        )

    def execute(self, plan: StepPlan) -> StepResult:
        before, result = self.wrong_rows, self.launch(plan).wait()
        assert self.wrong_rows == before, f"step {plan.step} read KV that is not its sequences'"
        return result

    def launch(self, plan: StepPlan) -> ScriptedStep:
        """Fixes tokens and blocks now, as a launch does; reads and writes KV as late as it can: in `wait`."""
        self._last = ScriptedStep(self, plan, self._last)
        return self._last


class ScriptedStep:
    def __init__(self, runner: ScriptedRunner, plan: StepPlan, before: ScriptedStep | None) -> None:
        self._runner, self._before = runner, before
        self._rows = [(item, list(item.block_ids), list(item.history), list(item.token_ids)) for item in plan.items]
        self.result: StepResult | None = None

    def wait(self) -> StepResult:
        runner, size = self._runner, self._runner.block_tokens
        runner.steps += 1
        tokens: list[int | None] = []
        logprobs: list[TokenLogprobs | None] = []
        further: dict[int, list[Sampled]] = {}
        for source, target in [pair for item, *_ in self._rows for pair in item.copies]:
            runner.kv[target] = runner.kv[source]
        for place, (item, blocks, history, own) in enumerate(self._rows):
            end = item.start + len(own)
            if item.follows is not None:
                assert own == [TO_COME]
                assert not item.sampling.penalised
                assert item.matcher is None
                assert self._before is not None
                assert self._before.result is not None, "steps end in order"
                token = self._before.result.token_ids[item.follows]
                assert token is not None
                own, history = [token], [*history[: item.start], token]  # it may be known by now
            known, history = len(history), [*history, *item.drafts]
            assert own == history[item.start : end]
            assert item.sample == (end == len(history))
            assert known - item.start == 1 or not item.drafts
            assert item.long or not runner.original or len(history) <= runner.original, "drafts of another rotary table"
            assert item.long == (0 < runner.original < known)
            runner.long_rows += len(own) if item.long else 0
            right = True
            for i in range(item.start):
                found = int(runner.kv[blocks[i // size], i % size])
                right &= found == kv_mark(history[: i + 1], long=item.long)
            for i in range(item.start, end):
                runner.kv[blocks[i // size], i % size] = kv_mark(history[: i + 1], long=item.long)
            # A row of a sequence that has ended may find others' KV in its blocks. Nobody may get this token.
            said: list[Sampled] = [self._say(item, history[:known], 0) if right else (WRONG, None)]
            for i, draft in enumerate(item.drafts, 1):
                if said[-1][0] != draft:
                    break
                said.append(self._say(item, history[: known + i], i))
            tokens.append(said[0][0] if item.sample else None)
            logprobs.append(said[0][1] if item.sample else None)
            if said[1:]:
                further[place] = said[1:]
            if not right:
                self._runner.wrong_rows += 1
        self._before = None
        self.result = StepResult(tuple(tokens), tuple(logprobs), further=further)
        return self.result

    def _say(self, item: PlanItem, history: list[int], after: int) -> Sampled:
        position = item.position + after
        if self._runner.searches:
            row = likeliest(history)
            return row[0][0], TokenLogprobs(row[0][1], row[: item.sampling.logprobs])
        token = next_token(prefix_mark(history), item.sampling, position, self._runner.words)
        return token, TokenLogprobs(-1.0 - position) if item.sampling.logprobs is not None else None
