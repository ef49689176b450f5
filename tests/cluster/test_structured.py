"""Structured output and logit bias over real processes: split and local alike, valid, refused where they must be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
from diptych.v1 import generate_pb2

from tests.support.processes import Cluster, Reply

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 12},
        "sunny": {"type": "boolean"},
        "celsius": {"type": "integer", "minimum": -40, "maximum": 50},
    },
    "required": ["city", "sunny", "celsius"],
    "additionalProperties": False,
}
FORMATS: dict[str, dict[str, Any]] = {
    "schema": {"json_schema": json.dumps(SCHEMA)},
    "regex": {"regex": r"[A-Z][a-z]{2,9}, \d{1,2} degrees"},
    "lark": {"lark": 'start: "It is " ("sunny" | "rainy") " in " /[A-Z][a-z]{3,8}/ "."'},
    "choice": {"choice": generate_pb2.Choice(options=["sunny", "rainy", "sun"])},
    "one token": {"choice": generate_pb2.Choice(options=["yes"])},
}


def request(placement: int, text: str, **sampling: Any) -> generate_pb2.GenerateRequest:
    request = generate_pb2.GenerateRequest(placement=placement, cache_salt=f"{placement}{text}")
    request.chat.messages.add(role="user", content=text)
    request.sampling.CopyFrom(generate_pb2.SamplingParams(**{"max_tokens": 48, **sampling}))
    return request


def check(name: str, reply: Reply) -> None:
    assert reply.finished.reason == generate_pb2.FINISH_REASON_STOP, (name, reply.text)
    if name == "schema":
        jsonschema.validate(json.loads(reply.text), SCHEMA)
    elif name == "regex":
        assert re.fullmatch(FORMATS["regex"]["regex"], reply.text)
    elif name == "lark":
        assert re.fullmatch(r"It is (sunny|rainy) in [A-Z][a-z]{3,8}\.", reply.text)
    else:
        assert reply.text in FORMATS[name]["choice"].options


@pytest.mark.timeout(300)
def test_split_and_local_give_the_same_valid_answer(cluster: Cluster) -> None:
    cases = [(name, temperature) for name in FORMATS for temperature in (0.0, 1.0)]
    requests = [
        request(
            placement,
            f"What is the weather like, by {name} and {temperature}?",
            structured=generate_pb2.StructuredOutput(**FORMATS[name]),
            temperature=temperature,
            seed=7,
            logit_bias={30: 1.5, 198: -100.0},
        )
        for name, temperature in cases
        for placement in (SPLIT, LOCAL)
    ]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda r: cluster.ask(r, 120.0), requests))
    for (name, _), split, local in zip(cases, replies[::2], replies[1::2], strict=True):
        check(name, split)
        assert split.split
        assert not local.split
        assert split.token_ids == local.token_ids, name


def test_a_bias_moves_the_answer_and_leaves_the_raw_distribution(cluster: Cluster) -> None:
    for placement in (SPLIT, LOCAL):
        biased = cluster.ask(request(placement, "Say hello.", max_tokens=3, logit_bias={1200: 100.0}, logprobs=2))
        assert biased.token_ids == [1200] * 3
    free = cluster.ask(request(LOCAL, "Say hello.", max_tokens=1))
    assert free.token_ids != [1200]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"json_schema": '{"type": "strin"}'}, "Invalid type: strin"),
        ({"json_schema": "{"}, "not JSON"),
        ({"regex": "[a-"}, "unclosed character class"),
        ({"lark": "start: <|nothing|>"}, "unknown special token"),
        ({"lark": "start: nothing"}, "unknown name"),
        ({"json_object": False}, "names no format"),
        ({}, "names no format"),
        ({"choice": generate_pb2.Choice(options=["x"] * 1025)}, "1025 options, the limit is 1024"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(cluster: Cluster, fields: Any, words: str) -> None:
    before = cluster.cluster().router.requests_total
    with pytest.raises(grpc.RpcError) as refused:
        cluster.ask(request(SPLIT, "Hi", structured=generate_pb2.StructuredOutput(**fields)))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert words in refused.value.details()  # type: ignore[attr-defined]
    assert cluster.cluster().router.requests_total == before


def test_a_character_that_no_token_can_write_is_an_explicit_error(cluster: Cluster) -> None:
    structured = generate_pb2.StructuredOutput(choice=generate_pb2.Choice(options=["\U00040000"]))
    for placement in (SPLIT, LOCAL):
        with pytest.raises(grpc.RpcError) as failed:
            cluster.ask(request(placement, "Hi", structured=structured))
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        assert "cannot go on" in failed.value.details()  # type: ignore[attr-defined]


def test_the_command_line_has_it(cluster: Cluster, tmp_path: Path) -> None:
    def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deploy.cli", "generate", "--target", cluster.target, "Weather?", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    jsonschema.validate(json.loads(generate("--json-schema", str(schema)).stdout), SCHEMA)
    assert generate("--choice", "yes", "--choice", "no", "--logit-bias", "198=-5").stdout.strip() in ("yes", "no")
    assert "not ID=V" in generate("--logit-bias", "x").stderr
    assert "exclude each other" in generate("--choice", "a", "--regex", "b").stderr
