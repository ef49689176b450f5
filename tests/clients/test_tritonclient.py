"""NVIDIA's own client, unmodified, against the router's public port."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients.environments import run_script
from tests.support.processes import Cluster
from tests.support.prompts import reference_greedy, text_of

MAX_TOKENS = 24


@pytest.mark.long
@pytest.mark.clients
@pytest.mark.timeout(300)
def test_tritonclient(cluster: Cluster, tokenizer: Any, model_path: Path) -> None:
    prompt = text_of(40, 11)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    expected = tokenizer.decode(reference_greedy(str(model_path), ids, MAX_TOKENS), skip_special_tokens=True)
    model = cluster.cluster().router.model
    seen = run_script("tritonclient", "triton.py", cluster.target, model, prompt, str(MAX_TOKENS))

    assert (seen["live"], seen["ready"], seen["model_ready"], seen["server"]) == (True, True, [True, False], "diptych")
    assert {"text_input", "stream", "max_tokens", "sampling_parameters"} <= set(seen["inputs"])

    assert seen["plain"] == [expected, "length"], "token-exact with plain transformers"
    assert seen["vllm_names"] == expected
    assert seen["with_prompt"] == prompt + expected

    assert not seen["streams"]["errors"]
    assert len(seen["streams"]["answers"]) == 4
    for responses in seen["streams"]["answers"].values():
        assert "".join(text for text, _, _ in responses) == expected
        assert len(responses) > 1, "it came in pieces"
        assert [final for _, final, _ in responses] == [False] * (len(responses) - 1) + [True]
        assert responses[-1][2] == "length"
    assert seen["unstreamed"]["answers"]["whole"] == [[expected, True, "length"]]
    assert seen["cancelled"] == 2
    assert seen["aio"] == [expected, True]

    (message,) = seen["one_bad"]["errors"]
    assert message.startswith("INVALID_ARGUMENT: beam_width is 40")
    statuses = {name: error[0] for name, error in seen["errors"].items()}
    # A millisecond: refused at admission by the estimates, or not kept.
    assert statuses.pop("timeout") in ("StatusCode.RESOURCE_EXHAUSTED", "StatusCode.DEADLINE_EXCEEDED")
    assert statuses == {
        "model": "StatusCode.NOT_FOUND",
        "beams": "StatusCode.INVALID_ARGUMENT",
        "stream": "StatusCode.INVALID_ARGUMENT",
        "dtype": "StatusCode.INVALID_ARGUMENT",
    }
    assert "served is" in seen["errors"]["model"][1]
    assert "ModelStreamInfer" in seen["errors"]["stream"][1]
    assert "send it as FP32" in seen["errors"]["dtype"][1]
