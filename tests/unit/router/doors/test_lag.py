"""What waits for a client over gRPC: how much may, in which order it leaves, and in what messages."""

from __future__ import annotations

import asyncio
import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diptych.v1 import generate_pb2

from router.config import RouterConfig
from router.doors.grpc.buffers import CallBuffer, SessionBuffer, SessionClient, best
from router.doors.grpc.service import GenerateServicer
from router.errors import Code, Failure
from router.prompt_logprobs import PromptLogprobs
from tests.unit.router.doors.test_service import Aborted, Context

DEFAULT_LIMIT = 4 << 20  # of gRPC's clients
LOGPROBS = generate_pb2.TokenLogprobs(
    logprob=-1.0, top=[generate_pb2.TopLogprob(token_id=100_000 + i, logprob=-1.0 - i) for i in range(20)]
)


class Counted:
    """A lag that remembers the most."""

    def __init__(self) -> None:
        self.most = 0

    def check(self, waiting_tokens: int) -> None:
        self.most = max(self.most, waiting_tokens)


@functools.cache
def scored(prompt_tokens: int) -> Any:
    """A life with log-probabilities of its prompt."""
    count = prompt_tokens - 1
    scores = PromptLogprobs(prompt_tokens, 0)
    ranks = np.full(count, 100_000, np.uint32)
    assert not scores.take(generate_pb2.PromptLogprobs(position=1, logprobs=[-1.5] * count, ranks=ranks))
    prompt = np.arange(100_000, 100_000 + prompt_tokens, dtype=np.uint32)
    return SimpleNamespace(prompt_logprobs=scores, request=SimpleNamespace(prompt=prompt))


def answered(buffer: CallBuffer, tokens: int, logprob: float = -1.0, prompt_tokens: int = 9) -> None:
    life: Any = SimpleNamespace(answered_tokens=tokens)
    buffer.life = life
    for position in range(tokens):
        buffer.token(position, 7, "a", generate_pb2.TokenLogprobs(logprob=logprob))
    usage = generate_pb2.Usage(prompt_tokens=prompt_tokens, cached_tokens=4, completion_tokens=tokens)
    buffer.finished(life, usage)  # type: ignore[arg-type]  # what `finished_to_wire` is made to say


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "router.doors.grpc.buffers.finished_to_wire", lambda life, usage: generate_pb2.Finished(usage=usage)
    )


class Answers:
    """A dispatcher whose requests are answered token by token, in turns; `fails`: which one fails at once."""

    def __init__(self, tokens: int, fails: int | None = None) -> None:
        self.config = RouterConfig(max_lag_tokens=16)
        self.submitted = 0
        self._tokens, self._fails = tokens, fails
        self._tasks: list[asyncio.Task[None]] = []

    async def submit(self, raw: Any, client: CallBuffer, **rest: Any) -> str:
        sampling = SimpleNamespace(bad_words=())
        life: Any = SimpleNamespace(
            request=SimpleNamespace(request_id="r", prompt=[1], sampling=sampling), answered_tokens=self._tokens
        )
        client.life = life
        number, self.submitted = self.submitted, self.submitted + 1
        if number == self._fails:
            client.failed(life, Failure(Code.UNAVAILABLE, "no worker is left"))
            client.wake()
        else:
            self._tasks.append(asyncio.create_task(self._answer(client)))
        return f"r{number}"

    async def _answer(self, client: CallBuffer) -> None:
        for position in range(self._tokens):
            await asyncio.sleep(0)
            client.token(position, 7, "a", generate_pb2.TokenLogprobs(logprob=-1.0))
            client.wake()
        client.done = True
        client.wake()

    def cancel(self, request_id: str) -> None:
        pass


def context() -> Any:
    async def nothing() -> None:
        pass

    return Context(nothing)


@pytest.mark.parametrize("best_of", [0, 1, 2, 5])
async def test_answers_that_are_compared_may_be_longer_than_a_client_may_lag(best_of: int) -> None:
    dispatcher: Any = Answers(tokens=100)
    client = context()
    request = generate_pb2.GenerateRequest(text="x", best_of=best_of)
    await GenerateServicer(dispatcher).generate(request, client)
    assert sum(len(r.tokens.token_ids) for r in client.written) == 100
    assert not any(r.tokens.logprobs for r in client.written) or best_of < 2, "they were not asked for"


@pytest.mark.parametrize("fields", [{"n": 8}, {"best_of": 8}])
async def test_no_further_answer_begins_after_one_has_failed(fields: dict[str, int]) -> None:
    dispatcher: Any = Answers(tokens=5, fails=1)
    with pytest.raises(Aborted, match="no worker is left"):
        await GenerateServicer(dispatcher).generate(generate_pb2.GenerateRequest(text="x", **fields), context())  # type: ignore[arg-type]
    assert dispatcher.submitted == 2


def test_a_long_answer_that_comes_at_once_fits_into_what_any_client_accepts() -> None:
    buffer = CallBuffer(None)
    for position in range(10_000):
        buffer.token(position, 100_000, "word", LOGPROBS)
    responses = buffer.take()
    assert max(r.ByteSize() for r in responses) < DEFAULT_LIMIT / 2
    assert [r.tokens.position for r in responses] == [
        sum(len(r.tokens.token_ids) for r in responses[:i]) for i in range(len(responses))
    ]
    assert sum(len(r.tokens.token_ids) for r in responses) == 10_000
    assert all(len(r.tokens.logprobs) == len(r.tokens.token_ids) for r in responses)
    assert sum(len(r.tokens.text) for r in responses) == 40_000


def test_answers_that_are_compared_keep_the_sum_alone_unless_more_was_asked_for(said: None) -> None:
    buffer = CallBuffer(None, says_logprobs=False)
    answered(buffer, 4, -2.0)
    assert buffer.mean_logprob == -2.0
    assert [len(r.tokens.logprobs) for r in buffer.take()] == [0, 0]


@pytest.mark.parametrize(("n", "best_of"), [(1, 1), (3, 3), (1, 4), (2, 4)])
def test_the_usage_of_all_answers_adds_up(said: None, n: int, best_of: int) -> None:
    """The prompt once, and each answer that was computed. The last one is the likeliest."""
    answers = [CallBuffer(None, number=number) for number in range(best_of)]
    for number, answer in enumerate(answers):
        answered(answer, 10 + number, logprob=-5.0 + number)
    responses = best(answers, n) if best_of > n else [r for answer in answers for r in answer.take()]
    usages = {r.answer: r.finished.usage for r in responses if r.HasField("finished")}
    assert sorted(usages) == list(range(n))
    assert [(u.prompt_tokens, u.cached_tokens) for u in usages.values()] == [(9, 4)] + [(0, 0)] * (n - 1)
    assert sum(u.completion_tokens for u in usages.values()) == sum(10 + number for number in range(best_of))
    if (n, best_of) == (2, 4):
        assert usages[1].completion_tokens == 12, "each but the first says its own"


def test_scored_prompts_leave_a_session_in_messages_that_any_client_accepts() -> None:
    session = SessionBuffer(Counted())  # type: ignore[arg-type]
    for handle in range(5):
        client = SessionClient(handle, session)
        client._scored = scored(131_072)
        client.token(0, 5, "x", None)
    responses = taken(session)
    assert max(r.ByteSize() for r in responses) < DEFAULT_LIMIT / 2
    assert [e.handle for r in responses for e in r.events] == [0, 1, 2, 3, 4]
    assert [list(r.handles) for r in responses] == [[]] * 4 + [[0, 1, 2, 3, 4]], "what is said of the prompt goes first"
    assert session.waiting_tokens == 0


def test_tokens_with_logprobs_do_too() -> None:
    session = SessionBuffer(Counted())  # type: ignore[arg-type]
    client = SessionClient(3, session)
    for position in range(10_000):
        client.token(position, 100_000, "word", LOGPROBS)
    responses = taken(session)
    assert max(r.ByteSize() for r in responses) < DEFAULT_LIMIT / 2
    assert [e.tokens.position for r in responses for e in r.events] == list(range(10_000))


def test_each_handle_keeps_its_order_when_a_reader_lags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (("started", generate_pb2.Started), ("finished", generate_pb2.Finished)):
        monkeypatch.setattr(f"router.doors.grpc.buffers.{name}_to_wire", lambda *_, made=message: made())
    session = SessionBuffer(Counted())  # type: ignore[arg-type]
    session.event(generate_pb2.SessionEvent(handle=9))
    for handle in range(3):
        client, life = SessionClient(handle, session), scored(131_072)
        client.started(life)
        for position in range(9_000):
            client.token(position, 5, "x", None)
        client.finished(life, None)  # type: ignore[arg-type]
    heard: dict[int, list[str]] = {handle: [] for handle in (0, 1, 2, 9)}
    for response in taken(session):
        early = [e for e in response.events if e.WhichOneof("event") in ("started", "prompt_logprobs")]
        for event in early:
            heard[event.handle].append(str(event.WhichOneof("event")))
        for handle in response.handles:
            if heard[handle][-1] != "columns":
                heard[handle].append("columns")
        for event in response.events:
            if event not in early:
                heard[event.handle].append(str(event.WhichOneof("event")))
    whole = ["started", "prompt_logprobs", "columns", "finished"]
    assert heard == {0: whole, 1: whole, 2: whole, 9: ["None"]}


def test_scored_prompts_that_nobody_reads_count_for_the_lag() -> None:
    """One of the largest is free: a client that reads is never cut off for it."""
    session, life = SessionBuffer(Counted()), scored(131_072)  # type: ignore[arg-type]
    counted: Any = session.lag
    waiting = []
    for handle in range(4):
        client = SessionClient(handle, session)
        client._scored = life
        client.token(0, 5, "x", None)
        client.wake()
        waiting.append(counted.most)
    assert waiting == [2, 4 + 8191, 6 + 2 * 8192 - 1, 8 + 3 * 8192 - 1]


def taken(session: SessionBuffer) -> list[generate_pb2.SessionResponse]:
    responses = []
    while (response := session.take()) is not None:
        responses.append(response)
    return responses
