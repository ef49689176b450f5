"""No input ends a worker: every number that shapes a draw at its extremes, pairwise, on a live worker in seconds.

Each request goes the router's way (admission, then the wire). What admission refuses, names its field; what it lets
pass is computed: nothing but tokens of the vocabulary, and never an error of the worker's. The same values go to the
worker past the router, too, which refuses them or computes. Beside them run requests whose answers are known.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from diptych.v1 import generate_pb2, worker_pb2

from engine.runner import ModelRunner
from engine.types import SamplingParams
from router.admission import RawRequest, RawSampling, ServedModel, admit, check_before_tokenizing
from router.config import RouterConfig
from router.doors.grpc.wire import request_from_wire
from router.errors import Code, RequestRefused
from router.request import LegStart
from router.wire import start_to_wire
from tests.support.live_worker import CONTEXT_LIMIT, VOCABULARY, LiveWorker, tiny_checkpoint, tiny_runner
from worker import messages
from worker.messages import StartSequence
from worker.wire import start_from_wire

NAN, INF = math.nan, math.inf
_NUMBERS = (0.0, -0.0, 1e-300, 1e-45, 1.2e-38, 1e-6, 1.0, 2.0, 1e30, 3.5e38, 1e300, -1.0, NAN, INF, -INF)
EXTREMES: dict[str, tuple[Any, ...]] = {
    "temperature": (*_NUMBERS, 1e-5, 100.0),
    "top_p": (*_NUMBERS, 0.999999, 0.5),
    "top_k": (0, 1, 2, VOCABULARY - 1, VOCABULARY, VOCABULARY + 1, 2**31 - 1, 2**32 - 1),
    "min_p": _NUMBERS,
    "repetition_penalty": (*_NUMBERS, 0.01, 100.0),
    "presence_penalty": (*_NUMBERS, -2.0),
    "frequency_penalty": (*_NUMBERS, -2.0),
    "seed": (0, 1, 2**63, 2**64 - 1),
    "max_tokens": (1, 2, CONTEXT_LIMIT, 2**32 - 1),
    "min_tokens": (0, 1, 2, 2**32 - 1),
    "logprobs": (0, 1, 20, 21, 2**31 - 1),
    "logit_bias": (
        {0: 100.0},
        dict.fromkeys(range(VOCABULARY), -100.0),
        {3: NAN},
        {3: INF},
        {3: 1e30},
        {2**32 - 1: 1.0},
    ),
    "stop_token_ids": ((0,), tuple(range(VOCABULARY)), (2**32 - 1,)),
    "allowed_token_ids": ((0,), (2,), tuple(range(VOCABULARY)), (VOCABULARY,), (2**32 - 1,)),
}
MODEL = ServedModel("tiny", VOCABULARY, CONTEXT_LIMIT, frozenset([2]))
CONFIG = RouterConfig(default_max_tokens=2)
PROMPT = [5, 6, 7, 5, 6]
BYSTANDERS = {
    "greedy": SamplingParams(max_tokens=40),
    "sampled": SamplingParams(max_tokens=40, temperature=0.9, top_p=0.9, seed=3, repetition_penalty=1.2),
}


def singles() -> list[dict[str, Any]]:
    return [{field: value} for field, values in EXTREMES.items() for value in values]


def pairs(singles: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each beside each of another field. Of values that are good alone: the others are refused whatever is beside."""
    found = [a | b for a, b in itertools.combinations(singles, 2) if a.keys() != b.keys()]
    random.Random(0).shuffle(found)
    return found


def fits(field: str, value: Any) -> bool:
    """Into the wire's own type."""
    return not (isinstance(value, float) and abs(value) > 3.4e38 and math.isfinite(value))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    return tiny_runner(tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(params=[False, True], ids=["in order", "overlapping"])
def worker(request: pytest.FixtureRequest, runner: ModelRunner) -> Iterator[LiveWorker]:
    worker = LiveWorker(runner, overlap=request.param)
    yield worker
    worker.close()


class Bystanders:
    """Some are always there; each answer is the one that it was when nobody else was."""

    def __init__(self, worker: LiveWorker) -> None:
        self._worker = worker
        self._numbers = itertools.count(1_000_000)
        self._running: dict[int, str] = {}
        self.add()
        worker.wait_for(*self._running)
        self.expected = {kind: worker.tokens[number] for number, kind in self._running.items()}

    def add(self) -> None:
        for kind, sampling in BYSTANDERS.items():
            number = next(self._numbers)
            self._worker.say(StartSequence(number, kind, [9, 8, 7, 6], [], sampling))
            self._running[number] = kind

    def check(self) -> None:
        self._worker.wait_for(*self._running)
        for number, kind in self._running.items():
            assert self._worker.tokens[number] == self.expected[kind], kind


def through_the_router(number: int, raw: RawRequest) -> StartSequence | RequestRefused:
    try:
        check_before_tokenizing(raw, CONFIG, MODEL)
        request = admit(raw, PROMPT, CONFIG, MODEL, 0.0, None, f"r{number}", random.Random(0))
    except RequestRefused as refused:
        return refused
    wire = start_to_wire(LegStart(number, request, ()), 60.0, "").SerializeToString()
    return start_from_wire(worker_pb2.StartSequence.FromString(wire))


def admitted(number: int, values: dict[str, Any]) -> StartSequence | None:
    start = through_the_router(number, RawRequest(token_ids=PROMPT, sampling=RawSampling(**values)))
    if not isinstance(start, RequestRefused):
        return start
    assert start.failure.code is Code.INVALID_ARGUMENT
    assert start.failure.field in values, (values, start.failure)
    return None


def test_what_is_admitted_is_computed_and_what_is_not_names_its_field(worker: LiveWorker) -> None:
    bystanders = Bystanders(worker)
    good: list[dict[str, Any]] = []
    for values in singles():
        if admitted(0, values) is not None:
            good.append(values)
    asked: list[dict[str, Any]] = []
    for values in good + pairs(good):
        start = admitted(len(asked), values)
        if start is None:
            continue  # min_tokens above max_tokens
        short = min(2, start.sampling.max_tokens)
        worker.say(replace(start, sampling=replace(start.sampling, max_tokens=short)))
        asked.append(values)
        if len(asked) % 500 == 0:
            bystanders.add()
            worker.wait_for(*range(len(asked)))
    worker.wait_for(*range(len(asked)))
    bystanders.check()
    for number, values in enumerate(asked):
        end, tokens = worker.ends[number], worker.tokens.get(number, [])
        silenced = len(values.get("stop_token_ids", ())) == VOCABULARY and values.get("min_tokens", 0) > 0
        assert silenced == bool(end.code), (values, end.error)  # it forbade each token that there is
        assert silenced or tokens, values
        assert all(0 <= token < VOCABULARY for token in tokens), values


def test_what_comes_past_the_router_is_refused_or_computed(worker: LiveWorker) -> None:
    bystanders = Bystanders(worker)

    def ask(asked: list[dict[str, Any]], first: int) -> list[messages.Ended]:
        for number, values in enumerate(asked, start=first):
            params = {"max_tokens": 2} | values
            if "stop_token_ids" in params:
                params["stop_token_ids"] = frozenset(params["stop_token_ids"])
            if "logit_bias" in params:
                params["logit_bias"] = tuple(params["logit_bias"].items())
            params["max_tokens"] = min(params["max_tokens"], 2)
            worker.say(StartSequence(number, f"r{number}", PROMPT, [], SamplingParams(**params)))
            if number % 500 == 0:
                bystanders.add()
                worker.wait_for(*range(first, number))
        numbers = range(first, first + len(asked))
        worker.wait_for(*numbers)
        for number, values in zip(numbers, asked, strict=True):
            assert all(0 <= token < VOCABULARY for token in worker.tokens.get(number, [])), values
        return [worker.ends[number] for number in numbers]

    alone = singles()
    ends = ask(alone, 1)
    assert {end.code for end in ends} == {0, messages.Code.INVALID_ARGUMENT}
    good = [values for values, end in zip(alone, ends, strict=True) if not end.code]
    for end in ask(pairs(good), len(alone) + 1):
        assert not end.code or "no token has a finite chance" in end.error, end.error
    bystanders.check()


def test_each_number_comes_through_the_wire_or_is_refused() -> None:
    """Of gRPC's own door, which has them in 32 bits."""
    for field, values in EXTREMES.items():
        for value in (v for v in values if fits(field, v)):
            sampling = generate_pb2.SamplingParams(**{field: value})
            message = generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=PROMPT), sampling=sampling)
            came = generate_pb2.GenerateRequest.FromString(message.SerializeToString())
            start = through_the_router(1, request_from_wire(came))
            if isinstance(start, RequestRefused):
                assert start.failure.field == field
            else:
                assert start.sampling.problem(VOCABULARY) == ""
