"""Agents, structured answers, other SDKs and a proxy, unmodified; most send our own answers back as history."""

from __future__ import annotations

import pytest

from tests.clients.environments import run_node, run_script
from tests.clients.test_openai_clients import expected
from tests.support.processes import Cluster

pytestmark = [pytest.mark.long, pytest.mark.clients, pytest.mark.timeout(600)]


def where(cluster: Cluster) -> tuple[str, str]:
    return f"http://127.0.0.1:{cluster.http_port}/v1", cluster.cluster().router.model


def test_huggingface_hub(cluster: Cluster) -> None:
    seen = run_script("huggingface_hub", "hub_chat.py", *where(cluster), timeout_s=120)
    answer = expected(cluster, ("user", "Why is the sky blue?"))
    assert seen["whole"] == seen["named"] == "".join(seen["pieces"]) == answer
    history = (("user", "Why is the sky blue?"), ("assistant", answer), ("user", "And red?"))
    assert seen["again"] == expected(cluster, *history)
    assert "model 'dummy' is not served here" in seen["unnamed"]  # its own name for no name


def test_openai_from_npm(cluster: Cluster) -> None:
    seen = run_node("openai", "openai_chat.mjs", *where(cluster), timeout_s=120)
    answer = expected(cluster, ("user", "Why is the sky blue?"))
    assert seen["whole"] == "".join(seen["pieces"]) == seen["response"] == answer
    assert seen["final"] in (answer, "LengthFinishReasonError")  # it refuses what max_tokens cut
    history = (("user", "Why is the sky blue?"), ("assistant", answer), ("user", "And red?"))
    assert seen["again"] == seen["answer"] == expected(cluster, *history)
    assert seen["refused"] == "context_length_exceeded"


def test_the_openai_agents_sdk(cluster: Cluster) -> None:
    seen = run_script("openai-agents", "agents_run.py", *where(cluster), timeout_s=240)
    for api in ("chat", "responses"):
        assert seen[api]["calls"] == 1
        assert "ToolCallOutputItem" in seen[api]["kinds"]
        assert seen[api]["events"] > 2
        assert isinstance(seen[api]["again"], str)
    assert "incomplete" in seen["cut"]  # it takes such an answer for a failure


def test_instructor(cluster: Cluster) -> None:
    seen = run_script("instructor", "instructor_run.py", *where(cluster), timeout_s=240)
    for mode in ("TOOLS", "JSON_SCHEMA"):
        assert 1 <= seen[mode]["inhabitants"] <= 9, seen[mode]
    # In JSON mode nothing enforces the schema, and the model is small.
    assert "inhabitants" in seen["JSON"] or seen["JSON"][0] in ("IncompleteOutputException", "InstructorRetryException")


def test_pydantic_ai(cluster: Cluster) -> None:
    seen = run_script("pydantic-ai", "pydantic_ai_run.py", *where(cluster), timeout_s=240)
    for name in ("chat tool", "chat native", "responses tool", "responses native"):
        assert 1 <= seen[name][0] <= 9, seen[name]
        assert isinstance(seen[name][1], str)
    assert seen["refused"] == "ModelContextWindowExceededError"


def test_llama_index(cluster: Cluster) -> None:
    seen = run_script("llama-index", "llama_index_run.py", *where(cluster), timeout_s=240)
    answer = expected(cluster, ("user", "Why is the sky blue?"))
    assert seen["whole"] == seen["async"] == "".join(seen["pieces"]) == answer
    assert seen["usage"] == 16
    history = (("user", "Why is the sky blue?"), ("assistant", answer), ("user", "And red?"))
    assert seen["again"] == expected(cluster, *history)
    assert seen["text"]
    ((name, arguments),) = seen["calls"]
    assert (name, list(arguments)) == ("weather", ["city"])
    assert isinstance(seen["after"], str)
    assert 1 <= seen["structured"]["inhabitants"] <= 9
    assert seen["refused"] == "context_length_exceeded"


def test_the_vercel_ai_sdk(cluster: Cluster) -> None:
    seen = run_node("ai", "ai_sdk.mjs", *where(cluster), timeout_s=240)
    answer = expected(cluster, ("user", "Why is the sky blue?"))
    assert seen["whole"] == "".join(seen["pieces"]) == answer
    assert (seen["finish"], seen["usage"], seen["streamed"]) == ("length", 16, 16)
    history = (("user", "Why is the sky blue?"), ("assistant", answer), ("user", "And red?"))
    assert seen["again"] == expected(cluster, *history)
    assert (seen["called"], seen["results"], seen["steps"]) == (2, ["sunny"], 2)
    assert {"tool-input-delta", "tool-call", "tool-result", "finish"} <= set(seen["parts"])
    for made in (seen["object"], seen["partial"]):
        assert 1 <= made["inhabitants"] <= 9
    assert seen["refused"] == [True, 400, "context_length_exceeded"]


def test_a_litellm_proxy(cluster: Cluster) -> None:
    seen = run_script("litellm-proxy", "litellm_proxy.py", *where(cluster), timeout_s=300)
    answer = expected(cluster, ("user", "Why is the sky blue?"))
    assert seen["whole"] == "".join(seen["pieces"]) == seen["response"] == answer
    assert (seen["usage"], seen["streamed"]) == (16, [16])
    ((name, arguments),) = seen["called"]
    assert name == "found"
    for made in (arguments, seen["object"]):
        assert sorted(made) == ["inhabitants", "name"]
    # It puts the status where our code was; its own word for it is in the message.
    assert seen["too_long"][:2] == ["BadRequestError", "400"]
    assert "ContextWindowExceededError" in seen["too_long"][2]
    assert seen["bad_value"][:2] == ["BadRequestError", "400"]
    assert "temperature is -1.0; use a number in [0, 100]" in seen["bad_value"][2]
