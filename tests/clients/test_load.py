"""Load generators, unmodified, over the OpenAI API: every request is answered, and their counts are ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.environments import environment, run
from tests.support.processes import Cluster

REQUESTS, PROMPT_TOKENS, ANSWER_TOKENS = 8, 40, 8


@pytest.mark.long
@pytest.mark.clients
@pytest.mark.timeout(900)
def test_aiperf(cluster: Cluster, model_path: Path, tmp_path: Path) -> None:
    aiperf = str(environment("aiperf") / "aiperf")
    before = cluster.cluster().router
    command = (
        f"{aiperf} profile -m {before.model} -u http://127.0.0.1:{cluster.http_port} --endpoint-type chat --streaming "
        f"--tokenizer {model_path} --request-count {REQUESTS} --concurrency 2 --isl {PROMPT_TOKENS} "
        f"--osl {ANSWER_TOKENS} --ui none --output-artifact-dir {tmp_path} --random-seed 1"
    )
    run(command.split(), 240)
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == REQUESTS
    assert not report["error_summary"]
    assert report["time_to_first_token"]["count"] == REQUESTS
    assert cluster.cluster().router.requests_total - before.requests_total >= REQUESTS
    assert cluster.cluster().router.errors_total == before.errors_total


@pytest.mark.long
@pytest.mark.clients
@pytest.mark.timeout(900)
def test_guidellm(cluster: Cluster, model_path: Path, tmp_path: Path) -> None:
    guidellm = str(environment("guidellm") / "guidellm")
    model, path = cluster.cluster().router.model, tmp_path / "report.json"
    command = (
        f"{guidellm} run --backend kind=openai_http,target=http://127.0.0.1:{cluster.http_port},model={model} "
        f"--profile kind=concurrent,streams=2 --constraint kind=max_requests,count={REQUESTS} "
        f"--tokenizer kind=hf_auto,model={model_path} "
        f"--data kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={ANSWER_TOKENS} "
        f"--output kind=json,path={path} --disable-console"
    )
    run(command.split(), 240)
    (benchmark,) = json.loads(path.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == REQUESTS, requests["errored"][:1]
    assert not requests["errored"]
    assert {r["output_metrics"]["text_tokens"] for r in requests["successful"]} == {ANSWER_TOKENS}
