"""Requests whose undisturbed answers are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diptych.v1 import generate_pb2

from tests.support.prompts import tokens_of

AUTO, LOCAL, SPLIT = generate_pb2.PLACEMENT_AUTO, generate_pb2.PLACEMENT_LOCAL, generate_pb2.PLACEMENT_SPLIT
_SCHEMA = """{"type": "object", "additionalProperties": false, "required": ["city", "rank", "visited"], "properties": {
    "city": {"enum": ["Paris", "Rome", "Oslo"]}, "rank": {"type": "integer", "minimum": 1, "maximum": 999},
    "visited": {"type": "boolean"}}}"""


@dataclass(frozen=True)
class Case:
    """`salt` None: a fresh one for every request, so that no cache helps."""

    name: str
    prompt: tuple[int, ...]
    sampling: generate_pb2.SamplingParams
    placement: int
    salt: str | None = None

    def request(self, salt: str, deadline_s: float, request_id: str = "") -> generate_pb2.GenerateRequest:
        return generate_pb2.GenerateRequest(
            request_id=request_id,
            token_ids=generate_pb2.TokenIds(ids=self.prompt),
            sampling=self.sampling,
            placement=self.placement,
            cache_salt=salt if self.salt is None else self.salt,
            deadline_ms=int(deadline_s * 1e3),
        )

    @property
    def greedy(self) -> bool:
        return not self.sampling.temperature


@dataclass(frozen=True)
class Answer:
    token_ids: tuple[int, ...]
    text: str
    reason: int


def cases_of(tokenizer: Any) -> list[Case]:
    """Short ones that stay on decode, long ones that are split, some with a prefix in common, some with a grammar, and
    some with answers long enough to go on elsewhere when their worker leaves.
    """

    def sampled(seed: int, max_tokens: int, **other: Any) -> generate_pb2.SamplingParams:
        return generate_pb2.SamplingParams(
            temperature=0.8, top_p=0.95, top_k=50, seed=seed, repetition_penalty=1.05, max_tokens=max_tokens, **other
        )

    def greedy(max_tokens: int) -> generate_pb2.SamplingParams:
        return generate_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True)

    def words(length: int, seed: int) -> tuple[int, ...]:
        return tuple(tokens_of(tokenizer, length, seed=seed))

    def structured(max_tokens: int, **other: Any) -> generate_pb2.SamplingParams:
        form = generate_pb2.StructuredOutput(json_schema=_SCHEMA)
        return generate_pb2.SamplingParams(max_tokens=max_tokens, structured=form, **other)

    shared, lent = words(256, 90), words(448, 93)
    return [
        Case("short greedy", words(12, 1), greedy(24), AUTO),
        Case("short sampled", words(33, 2), sampled(5, 24, logprobs=0), AUTO),
        Case("short split", words(64, 3), greedy(16), SPLIT),
        Case("medium sampled", words(150, 4), sampled(6, 16), AUTO),
        Case("long greedy", words(420, 5), greedy(20), AUTO),
        Case("long sampled", words(385, 6), sampled(7, 20, logprobs=2), SPLIT),
        Case("long local", words(300, 7), greedy(12), LOCAL),
        Case("long split", words(512, 8), greedy(12), SPLIT),
        Case("shared prefix a", shared + words(40, 91), greedy(12), AUTO, salt="shared"),
        Case("shared prefix b", shared + words(70, 92), sampled(8, 12), SPLIT, salt="shared"),
        # Long enough that a worker without the prefix pulls it from one that has it.
        Case("lent prefix a", lent + words(20, 94), greedy(10), AUTO, salt="lent"),
        Case("lent prefix b", lent + words(30, 95), sampled(9, 10), AUTO, salt="lent"),
        Case("lent prefix c", lent + words(25, 96), greedy(10), LOCAL, salt="lent"),
        Case("structured", words(80, 10), structured(40), AUTO),
        Case("structured sampled", words(180, 11), structured(40, temperature=0.9, seed=10), SPLIT),
        Case("long answer", words(60, 12), greedy(100), AUTO),
        Case("long answer sampled", words(120, 13), sampled(12, 100, frequency_penalty=0.4, logprobs=1), SPLIT),
        Case("one token", words(200, 9), greedy(1), SPLIT),
    ]


def big_cases_of(tokenizer: Any) -> list[Case]:
    """To fill pools: three of them do not fit into one worker at once."""
    params = generate_pb2.SamplingParams(max_tokens=10, ignore_eos=True)
    return [
        Case(f"big {placement}", tuple(tokens_of(tokenizer, 900, seed=100 + placement)), params, placement)
        for placement in (AUTO, LOCAL, SPLIT)
    ]


def lasting_cases_of(tokenizer: Any) -> list[Case]:
    """Answers of some hundred to a thousand tokens, of every kind that is to go on elsewhere exactly, and some long
    prompts between them.
    """

    def words(length: int, seed: int) -> tuple[int, ...]:
        return tuple(tokens_of(tokenizer, length, seed=seed))

    def params(max_tokens: int, **other: Any) -> generate_pb2.SamplingParams:
        return generate_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, **other)

    sampled = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}
    form = generate_pb2.StructuredOutput(json_schema=_SCHEMA)
    return [
        Case("400 greedy", words(40, 31), params(400), AUTO),
        Case("1000 greedy", words(90, 32), params(1000), AUTO),
        Case("300 greedy, split", words(150, 33), params(300), SPLIT),
        Case("600 sampled", words(60, 34), params(600, seed=34, **sampled), AUTO),
        Case("300 penalised", words(100, 35), params(300, repetition_penalty=1.1, frequency_penalty=0.4), LOCAL),
        Case("400 with logprobs", words(80, 36), params(400, seed=36, logprobs=2, **sampled), AUTO),
        Case("long prompt", words(480, 37), params(60), SPLIT),
        Case("long prompt sampled", words(400, 38), params(80, seed=38, **sampled), AUTO),
        Case("structured", words(120, 39), generate_pb2.SamplingParams(max_tokens=60, structured=form), SPLIT),
    ]
