"""One answer over several attempts, message by message: what is sent, what comes out, when it is given up."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from diptych.client import NO_RETRIES, AsyncClient, Chunk, Client, RequestFailed, Retrying
from diptych.client._answering import Answering, RetryBudget, Trouble, request_of
from diptych.v1 import generate_pb2 as pb

BROKEN = Trouble("UNAVAILABLE", "Socket closed", by_server=False)
ROOT = Path(__file__).resolve().parents[3]


def answering(retrying: Retrying = Retrying(), timeout_s: float = 100.0, **fields: object) -> Answering:  # noqa: B008
    request = pb.GenerateRequest(text="hi", **fields)  # type: ignore[arg-type]
    return Answering(request, timeout_s, retrying, RetryBudget(retrying), random.Random(0), 0.0)


def started(text: str = "", prompt_tokens: int = 2) -> pb.GenerateResponse:
    return pb.GenerateResponse(started=pb.Started(request_id="r", prompt_tokens=prompt_tokens, seed=77, text=text))


def tokens(position: int, ids: list[int], text: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(tokens=pb.Tokens(position=position, token_ids=ids, text=text))


FINISHED = pb.GenerateResponse(
    finished=pb.Finished(reason=pb.FINISH_REASON_STOP, usage=pb.Usage(completion_tokens=3), recoveries=1)
)


def test_an_answer_that_nothing_disturbs() -> None:
    a = answering()
    request, timeout_s = a.attempt(1.0)
    assert (request.text, timeout_s) == ("hi", 99.0)
    heard = [a.hear(m) for m in (started(), tokens(0, [5], "a"), tokens(1, [6, 7], "bc"), FINISHED)]
    assert heard == [None, Chunk(0, (5,), "a"), Chunk(1, (6, 7), "bc"), None]
    assert a.done
    assert (a.answer.text, a.answer.token_ids, a.answer.finish_reason, a.answer.seed) == ("abc", [5, 6, 7], "stop", 77)
    assert (a.answer.retries, a.answer.resumes, a.answer.recoveries) == (0, 0, 1)


def test_a_broken_stream_goes_on_behind_what_came_with_the_seed_that_was_drawn() -> None:
    a = answering()
    a.attempt(0.0)
    for message in (started(), tokens(0, [5, 6], "ab")):
        a.hear(message)
    delay = a.trouble(BROKEN, 2.0)
    assert 0.05 <= delay <= 0.15
    request, timeout_s = a.attempt(3.0)
    assert (list(request.emitted_token_ids), request.sampling.seed, timeout_s) == ([5, 6], 77, 97.0)
    assert a.hear(started("ab")) is None, "known text comes once"
    assert a.hear(tokens(2, [7], "c")) == Chunk(2, (7,), "c")
    a.hear(FINISHED)
    assert (a.answer.text, a.answer.token_ids, a.answer.resumes) == ("abc", [5, 6, 7], 1)


def test_as_much_of_the_prompt_as_fitted_is_kept_when_an_answer_goes_on() -> None:
    for kept, sent in ((-1, 2), (9, 9)):
        a = answering(truncate_prompt_tokens=kept)
        assert a.attempt(0.0)[0].truncate_prompt_tokens == kept
        a.hear(started())
        a.hear(tokens(0, [5], "a"))
        a.trouble(BROKEN, 2.0)
        assert a.attempt(3.0)[0].truncate_prompt_tokens == sent
    a = answering()
    a.attempt(0.0)
    a.hear(started())
    a.hear(tokens(0, [5], "a"))
    a.trouble(BROKEN, 2.0)
    assert not a.attempt(3.0)[0].HasField("truncate_prompt_tokens")


def test_text_that_was_held_back_and_text_that_was_flushed_come_once() -> None:
    """The router replays the answer's text: less than the client has (a flush), or as much."""
    a = answering()
    a.attempt(0.0)
    for message in (started(), tokens(0, [5, 6], "ab"), tokens(2, [], "c")):
        a.hear(message)
    a.trouble(BROKEN, 1.0)
    a.attempt(2.0)
    assert [a.hear(m) for m in (started("ab"), tokens(2, [], "c"), FINISHED)] == [None, None, None]
    assert a.answer.text == "abc"


def test_before_the_first_token_the_same_request_is_sent_again() -> None:
    a = answering()
    first, _ = a.attempt(0.0)
    a.hear(started())
    a.trouble(BROKEN, 1.0)
    second, _ = a.attempt(1.1)
    assert second == first
    assert (a.answer.retries, a.answer.resumes) == (1, 0)


def test_the_servers_hint_is_kept_and_patience_is_bounded() -> None:
    a = answering(Retrying(patience_s=5.0))
    now, delays = 0.0, []
    a.attempt(now)
    busy = Trouble("RESOURCE_EXHAUSTED", "full", True, retry_after_s=1.2)
    for _ in range(4):
        delays.append(a.trouble(busy, now))
        now += delays[-1]
        a.attempt(now)
    assert delays == [1.2] * 4
    with pytest.raises(RequestFailed, match="given up after 5 attempts") as failed:
        a.trouble(busy, now)
    assert failed.value.retry_after_s == 1.2


def test_a_token_renews_the_patience() -> None:
    a = answering(Retrying(patience_s=5.0))
    for position, now in enumerate((0.0, 4.0, 8.0, 12.0)):
        a.attempt(now)
        a.hear(started("x" * position))
        a.hear(tokens(position, [1], "x"))
        assert a.trouble(BROKEN, now + 3.0) < 1.0
    assert a.answer.text == "xxxx"


@pytest.mark.parametrize(
    "trouble",
    [
        Trouble("INVALID_ARGUMENT", "bad", True, field="top_p"),
        Trouble("DEADLINE_EXCEEDED", "late", True),
        Trouble("RESOURCE_EXHAUSTED", "the client left 3 tokens unread", True),
        Trouble("UNIMPLEMENTED", "no such method", False),
        Trouble("ALREADY_EXISTS", "live", True),
        Trouble("FAILED_PRECONDITION", "no prefill worker is ready", True, field="placement"),
    ],
)
def test_what_a_retry_would_not_help_fails_at_once(trouble: Trouble) -> None:
    a = answering()
    a.attempt(0.0)
    with pytest.raises(RequestFailed) as failed:
        a.trouble(trouble, 0.1)
    assert (failed.value.code, failed.value.field) == (trouble.code, trouble.field)


def test_an_own_request_id_may_be_live_for_a_moment_after_the_stream_broke() -> None:
    a = answering(request_id="mine")
    a.attempt(0.0)
    a.trouble(BROKEN, 0.0)
    a.attempt(0.1)
    assert a.trouble(Trouble("ALREADY_EXISTS", "live", True), 0.2) > 0


def test_a_router_that_has_just_started_may_not_know_its_prefill_workers_yet() -> None:
    a = answering()
    a.attempt(0.0)
    a.trouble(BROKEN, 0.0)
    a.attempt(0.1)
    assert a.trouble(Trouble("FAILED_PRECONDITION", "no prefill worker", True, field="placement"), 0.2) > 0
    a.attempt(0.3)
    with pytest.raises(RequestFailed, match="prompt had"):
        a.trouble(Trouble("FAILED_PRECONDITION", "the prompt had 3 tokens", True), 0.4)


def test_no_retries() -> None:
    a = answering(NO_RETRIES)
    a.attempt(0.0)
    with pytest.raises(RequestFailed, match="Socket closed"):
        a.trouble(BROKEN, 1.0)


def test_the_deadline_holds_over_all_attempts() -> None:
    a = answering(timeout_s=3.0)
    a.attempt(0.0)
    a.trouble(BROKEN, 1.0)
    with pytest.raises(RequestFailed, match="no whole answer within 3 s"):
        a.attempt(3.0)
    a = answering(timeout_s=3.0, deadline_ms=2000)
    assert a.attempt(0.0)[1] == 2.0
    a.trouble(BROKEN, 0.5)
    assert a.attempt(1.5)[0].deadline_ms == 500


def test_refusals_beyond_each_requests_first_come_out_of_one_budget() -> None:
    retrying = Retrying(share=0.5, burst=1.0)
    budget = RetryBudget(retrying)
    busy = Trouble("UNAVAILABLE", "busy", True, 0.1)

    def one() -> Answering:
        made = Answering(pb.GenerateRequest(text="x"), 100.0, retrying, budget, random.Random(0), 0.0)
        made.attempt(0.0)
        return made

    first, second = one(), one()
    for a in (first, second):
        a.trouble(busy, 0.0)
        a.attempt(0.2)
    first.trouble(busy, 0.3)
    with pytest.raises(RequestFailed, match="too many"):
        second.trouble(busy, 0.3)


def test_an_answer_that_does_not_fit_is_never_passed_on() -> None:
    a = answering()
    a.attempt(0.0)
    a.hear(started())
    a.hear(tokens(0, [5], "a"))
    with pytest.raises(RequestFailed, match="position 3 came where 1 was due"):
        a.hear(tokens(3, [6], "b"))
    a.trouble(BROKEN, 1.0)
    a.attempt(2.0)
    with pytest.raises(RequestFailed, match="ask anew") as failed:
        a.hear(started("a", prompt_tokens=3))
    assert failed.value.partial.text == "a"


def test_a_router_that_does_not_know_prompt_logprobs_is_named_at_the_end() -> None:
    wanted = pb.SamplingParams(prompt_logprobs=0)
    a = answering(sampling=wanted)
    a.attempt(0.0)
    for message in (started(), tokens(0, [5], "a")):
        a.hear(message)
    with pytest.raises(RequestFailed, match="upgrade it, or leave prompt_logprobs out") as failed:
        a.hear(FINISHED)
    assert (failed.value.code, failed.value.field) == ("UNIMPLEMENTED", "prompt_logprobs")
    assert (failed.value.partial.text, failed.value.partial.finish_reason, a.done) == ("a", "stop", True)


def test_prompt_logprobs_that_came_before_a_break_or_are_not_due_are_not_missed() -> None:
    wanted = pb.SamplingParams(prompt_logprobs=0)
    a = answering(sampling=wanted)
    a.attempt(0.0)
    scored = pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(position=1, token_ids=[3], logprobs=[-1.0]))
    for message in (started(), scored, tokens(0, [5], "a")):
        a.hear(message)
    a.trouble(BROKEN, 1.0)
    a.attempt(2.0)
    for message in (started("a"), FINISHED):
        a.hear(message)
    assert a.answer.prompt_logprobs is not None
    resumed = answering(sampling=wanted, emitted_token_ids=[5])
    resumed.attempt(0.0)
    resumed.hear(FINISHED)
    assert resumed.done


def test_a_closed_client_and_one_that_finds_nobody() -> None:
    nobody = Client("127.0.0.1:1", retrying=NO_RETRIES, timeout_s=20.0)
    with pytest.raises(RequestFailed, match="UNAVAILABLE"):
        nobody.generate("hi")
    with pytest.raises(RequestFailed, match="UNAVAILABLE"):
        nobody.cluster()
    with pytest.raises(TimeoutError, match="UNAVAILABLE"):
        nobody.wait_ready(0.0)
    nobody.close()
    with pytest.raises(RequestFailed, match="closed; make another"):
        nobody.generate("hi")


async def test_the_same_for_asyncio() -> None:
    nobody = AsyncClient("127.0.0.1:1", retrying=NO_RETRIES, timeout_s=20.0)
    with pytest.raises(RequestFailed, match="UNAVAILABLE"):
        await nobody.generate("hi")
    with pytest.raises(TimeoutError, match="UNAVAILABLE"):
        await nobody.wait_ready(0.0)
    await nobody.close()
    with pytest.raises(RequestFailed, match="closed; make another"):
        await nobody.generate("hi")


def test_requests_say_what_options_say() -> None:
    made = request_of(
        [{"role": "user", "content": "hi"}],
        {
            "stop": "x",
            "stop_token_ids": [3],
            "temperature": 0.5,
            "placement": "split",
            "logit_bias": {7: -1.0},
            "allowed_token_ids": [7, 8],
            "bad_words": ["ugh"],
            "model": "m",
        },
    )
    assert (list(made.sampling.allowed_token_ids), list(made.sampling.bad_words)) == ([7, 8], ["ugh"])
    assert made.chat.messages[0].content == "hi"
    assert (list(made.sampling.stop), list(made.sampling.stop_token_ids)) == (["x"], [3])
    assert (made.sampling.temperature, made.placement, made.model) == (0.5, pb.PLACEMENT_SPLIT, "m")
    assert dict(made.sampling.logit_bias) == {7: -1.0}
    assert list(request_of((1, 2), {}).token_ids.ids) == [1, 2]
    whole = pb.GenerateRequest(text="hi", sampling=pb.SamplingParams(top_k=2))
    assert request_of(whole, {"max_tokens": 4}).sampling == pb.SamplingParams(top_k=2, max_tokens=4)
    with pytest.raises(TypeError, match="max_token"):
        request_of("hi", {"max_token": 3})  # type: ignore[typeddict-unknown-key]


def test_the_client_needs_nothing_else_of_ours() -> None:
    code = (
        "import sys, diptych.client; "
        "bad = {'torch', 'numpy', 'router', 'engine', 'ray', 'transformers', 'pydantic'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT / "proto", env={"PYTHONPATH": str(ROOT / "proto")}
    )


@pytest.mark.parametrize("fields", [{"n": 2}, {"best_of": 3}])
def test_a_request_for_several_answers_is_not_for_this_client(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="each answer by itself"):
        request_of(pb.GenerateRequest(text="a", **fields), {})
