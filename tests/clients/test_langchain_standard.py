"""LangChain's own tests of a chat model, against us: what a small model cannot do may fail, and nothing else."""

from __future__ import annotations

import pytest

from tests.clients.environments import run_script
from tests.support.processes import Cluster

# They ask for a sensible argument, an unprompted call, or an answer that ends by itself within max_tokens.
OF_THE_MODEL = (
    "test_tool_calling",
    "test_tool_choice",
    "test_structured_output",
    "test_agent_loop",
    "test_unicode_tool_call_integration",
)
PASS = {
    *("test_invoke", "test_ainvoke", "test_batch", "test_abatch", "test_conversation"),
    *(f"test_{name}[model{i}]" for name in ("stream", "astream") for i in (0, 1)),
    *("test_stream_events_v3", "test_astream_events_v3", "test_double_messages_conversation"),
    *("test_usage_metadata", "test_usage_metadata_streaming", "test_stop_sequence", "test_message_with_name"),
    *("test_tool_message_histories_string_content", "test_tool_message_histories_list_content"),
    *("test_tool_message_error_status", "test_structured_few_shot_examples", "test_bind_runnables_as_tools"),
}


@pytest.mark.long
@pytest.mark.clients
@pytest.mark.timeout(1200)
def test_langchains_standard_tests(cluster: Cluster) -> None:
    base, model = f"http://127.0.0.1:{cluster.http_port}/v1", cluster.cluster().router.model
    seen = run_script("langchain-tests", "langchain_standard.py", base, model, timeout_s=1100)
    assert {name for name, outcome in seen["outcomes"].items() if outcome == "passed"} >= PASS, seen["words"]
    for name, words in seen["words"].items():
        assert name.startswith(OF_THE_MODEL), (name, words)
        assert "Error code" not in words, (name, words)  # we refused nothing
