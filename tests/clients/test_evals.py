"""lm-evaluation-harness, unmodified, over /v1/completions: its numbers are those of plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients.environments import run_script
from tests.support.processes import Cluster
from tests.support.prompts import reference_greedy, reference_model

pytestmark = [pytest.mark.long, pytest.mark.clients, pytest.mark.timeout(900)]


def likelihood(path: Path, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Of the continuation, and whether it is what a greedy answer would say."""
    with torch.inference_mode():
        logits = reference_model(str(path))(torch.tensor([context + continuation])).logits[0, :-1]
    rows = torch.log_softmax(logits.float(), dim=-1)[len(context) - 1 :]
    wanted = torch.tensor(continuation)
    return rows.gather(-1, wanted[:, None]).sum().item(), bool((rows.argmax(-1) == wanted).all())


def test_lm_evaluation_harness(cluster: Cluster, model_path: Path, tokenizer: Any, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{cluster.http_port}/v1"
    model = cluster.cluster().router.model
    seen = run_script("lm-eval", "lm_eval_run.py", url, model, str(model_path), str(tmp_path), timeout_s=400)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    right = 0
    for sample in seen["samples"]["choices"]:
        values = []
        for (context, continuation), said in zip(sample["arguments"], sample["responses"], strict=True):
            whole = ids(context + continuation)
            value, greedy = likelihood(model_path, whole[: len(ids(context))], whole[len(ids(context)) :])
            assert float(said[0]) == pytest.approx(value, abs=1e-3)
            assert str(said[1]) == str(greedy)
            values.append(value)
        right += values.index(max(values)) == sample["doc"]["answer"]
    assert seen["results"]["choices"]["acc,none"] == right / 4
    assert right >= 3, "the model is small, and knows the capital of France"
    for sample in seen["samples"]["rolling"]:
        text = ids(sample["doc"]["text"])
        value, _ = likelihood(model_path, [tokenizer.bos_token_id], text)
        assert float(sample["responses"][0]) == pytest.approx(value, abs=1e-2)
    for sample in seen["samples"]["generate"]:
        answer = tokenizer.decode(reference_greedy(str(model_path), ids(sample["doc"]["question"]), 12))
        assert sample["responses"][0] == answer.split("\n\n")[0].split(tokenizer.eos_token)[0]
