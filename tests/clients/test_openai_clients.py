"""What people put on top of the OpenAI API, unmodified: litellm and a LangChain chat model."""

from __future__ import annotations

import pytest
from diptych.v1 import generate_pb2

from tests.clients.environments import run_script
from tests.support.processes import Cluster

MAX_TOKENS = 16


def expected(cluster: Cluster, *messages: tuple[str, str]) -> str:
    """The same chat over gRPC."""
    request = generate_pb2.GenerateRequest(sampling=generate_pb2.SamplingParams(max_tokens=MAX_TOKENS))
    for role, content in messages:
        request.chat.messages.add(role=role, content=content)
    return cluster.ask(request).text


@pytest.mark.long
@pytest.mark.clients
@pytest.mark.timeout(600)
def test_litellm(cluster: Cluster) -> None:
    base, model = f"http://127.0.0.1:{cluster.http_port}/v1", cluster.cluster().router.model
    seen = run_script("litellm", "litellm_chat.py", base, model, timeout_s=120)
    answer = expected(cluster, ("user", "Why is the sky blue?"))
    assert seen["whole"] == seen["async"] == "".join(seen["pieces"]) == answer
    assert len(seen["pieces"]) > 3
    assert seen["usage"] == MAX_TOKENS
    assert seen["text"]
    assert seen["bad_model"][0] == "NotFoundError"
    assert "served is" in seen["bad_model"][1]
    assert seen["bad_value"][0] == "BadRequestError"
    assert "temperature is -1.0; use a number in [0, 100]" in seen["bad_value"][1]
    assert seen["too_long"][0] == "ContextWindowExceededError"


@pytest.mark.long
@pytest.mark.clients
@pytest.mark.timeout(600)
def test_a_langchain_chat_model(cluster: Cluster) -> None:
    base, model = f"http://127.0.0.1:{cluster.http_port}/v1", cluster.cluster().router.model
    seen = run_script("langchain", "langchain_chat.py", base, model, timeout_s=120)
    answer = expected(cluster, ("system", "You are brief."), ("user", "Why is the sky blue?"))
    assert seen["whole"] == seen["async"] == seen["chain"] == "".join(seen["pieces"]) == answer
    assert seen["batch"] == [answer, answer]
    assert (seen["usage"], seen["finish"]) == (MAX_TOKENS, "length")
    assert seen["refused"] == "OpenAIContextOverflowError"
