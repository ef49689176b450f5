"""Other SDKs, unmodified; each sends our own answers back as history."""

from __future__ import annotations

import pytest

from tests.clients.environments import run_node, run_script
from tests.clients.test_openai_clients import expected
from tests.support.processes import Cluster

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]


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
