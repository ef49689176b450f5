"""`diptych.client` against a real cluster, and over a router that dies in the middle of answers."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from diptych.client import AsyncClient, Client, RequestFailed

from tests.support.processes import Cluster
from tests.support.prompts import reference_greedy, text_of, tokens_of

MAX_TOKENS = 60


def test_generate_stream_and_errors(cluster: Cluster, tokenizer: Any, model_path: Path) -> None:
    prompt = tokens_of(tokenizer, 30, 21)
    expected = reference_greedy(str(model_path), prompt, 12)
    with Client(cluster.target) as client:
        client.wait_ready(5.0)
        answer = client.generate(prompt, max_tokens=12)
        assert (answer.token_ids, answer.finish_reason) == (expected, "length")
        assert answer.usage.completion_tokens == 12
        with client.stream(prompt, max_tokens=12) as stream:
            chunks = list(stream)
        assert [t for c in chunks for t in c.token_ids] == expected
        assert "".join(c.text for c in chunks) == stream.answer.text == answer.text
        drawn = client.generate("Once", temperature=1.0, max_tokens=8)
        assert client.generate("Once", temperature=1.0, max_tokens=8, seed=drawn.seed).token_ids == drawn.token_ids
        with pytest.raises(RequestFailed, match=r"top_p is 3\.0; use a number in \(0, 1\]") as failed:
            client.generate("Once", top_p=3.0)
        assert (failed.value.code, failed.value.field) == ("INVALID_ARGUMENT", "top_p")
        with client.stream("Once", max_tokens=4000, ignore_eos=True) as stream:
            next(stream)
        assert stream.answer.finish_reason == "cancelled"
        cluster.assert_nothing_left()


async def test_async_generate_and_cancel(cluster: Cluster) -> None:
    async with AsyncClient(cluster.target) as client:
        answers = await asyncio.gather(*[client.generate("Once upon", max_tokens=6) for _ in range(4)])
        assert len({a.text for a in answers}) == 1
        async with client.stream("Once", max_tokens=4000, ignore_eos=True) as stream:
            async for _ in stream:
                stream.cancel()
        assert stream.answer.finish_reason == "cancelled"
        task = asyncio.create_task(client.generate("Once", max_tokens=4000, ignore_eos=True))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.to_thread(cluster.assert_nothing_left)


@pytest.mark.timeout(240)
def test_a_killed_router_costs_no_token(restarting: Cluster, tokenizer: Any) -> None:
    """Greedy, sampled without a seed, with penalties, chat: each answer is the undisturbed one, over kill -9."""
    prompts: dict[str, tuple[Any, dict[str, Any]]] = {
        "greedy, split": (tokens_of(tokenizer, 150, 5), {"placement": "split"}),
        "sampled": (text_of(30, 6), {"temperature": 0.9, "top_p": 0.95}),
        "penalties, split": (
            text_of(20, 7),
            {"repetition_penalty": 1.3, "min_tokens": MAX_TOKENS, "logprobs": 2, "placement": "split"},
        ),
        "chat": ([{"role": "user", "content": "Tell me about the sea."}], {}),
    }
    cluster = restarting
    answers: dict[str, Any] = {}
    errors: list[BaseException] = []
    half_way = threading.Barrier(len(prompts) + 1, timeout=60)

    def ask(client: Client, name: str, **more: Any) -> None:
        prompt, options = prompts[name]
        try:
            with client.stream(prompt, max_tokens=MAX_TOKENS, ignore_eos=True, **options, **more) as stream:
                texts, ids = [], []
                for chunk in stream:
                    assert chunk.position == len(ids) or not chunk.token_ids
                    texts.append(chunk.text)
                    waits = len(ids) < 5 <= len(ids) + len(chunk.token_ids)
                    ids += chunk.token_ids
                    if waits:
                        half_way.wait()
                assert (ids, "".join(texts)) == (stream.answer.token_ids, stream.answer.text)
                answers[name] = stream.answer
        except BaseException as error:
            errors.append(error)
            half_way.abort()

    with Client(cluster.target) as client:
        threads = [threading.Thread(target=ask, args=(client, name)) for name in prompts]
        for thread in threads:
            thread.start()
        half_way.wait()
        cluster.kill("router")
        cluster.processes.spawn("router", "router", cluster._router_config())
        for thread in threads:
            thread.join(90)
        assert not errors, f"{errors}\n{cluster.logs()}"
        assert set(answers) == set(prompts), f"these never ended\n{client.cluster()}\n{cluster.logs()}"
        for name, (prompt, options) in prompts.items():
            answer = answers[name]
            again = client.generate(prompt, max_tokens=MAX_TOKENS, ignore_eos=True, seed=answer.seed, **options)
            assert again.resumes == 0
            assert answer.token_ids == again.token_ids, name
            assert answer.text == again.text, name
            assert answer.usage.completion_tokens == MAX_TOKENS
            assert len(answer.logprobs) == len(again.logprobs)
        assert sum(a.resumes for a in answers.values()) >= 3, "most were cut"
    expected = reference_greedy(str(cluster.model), prompts["greedy, split"][0], MAX_TOKENS)
    assert answers["greedy, split"].token_ids[: len(expected)] == expected
    cluster.assert_nothing_left()
