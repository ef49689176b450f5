"""The model's generation_config.json decides what a request leaves out, at every door, unless told otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diptych.v1 import generate_pb2

from router.config import RouterConfig
from tests.support.in_process_router import GENERATE, InProcessRouter
from tests.support.raw_http import Http

MODELS_OWN = {"temperature": 0.5, "top_p": 0.75, "top_k": 20, "repetition_penalty": 1.25, "max_new_tokens": 7}
CHAT = [{"role": "user", "content": "hi"}]


def told(router: InProcessRouter) -> dict[str, float]:
    """The sampling of the last sequence that the worker was given."""
    s = router.worker.starts[-1].sampling
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")
    return {name: round(getattr(s, name), 6) for name in names}


@pytest.mark.parametrize("whose", ["model", "ours"])
def test_every_door_fills_in_the_models_own(tmp_path: Path, model_path: Path, whose: Any) -> None:
    path = tmp_path / "model"
    shutil.copytree(model_path, path, ignore=shutil.ignore_patterns("*.safetensors"))
    (path / "generation_config.json").write_text(json.dumps(MODELS_OWN))
    config = RouterConfig(model=str(path), grpc_port=0, http_port=0, internal_port=0, generation_config=whose)
    router = InProcessRouter(config)
    theirs = {"temperature": 0.5, "top_p": 0.75, "top_k": 20, "repetition_penalty": 1.25}
    ours = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    own = whose == "model"
    try:
        http = Http(router.router.http.port)  # type: ignore[union-attr]
        name = router.router.dispatcher.model_name
        for url, body in (
            ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 3}),
            ("/v1/completions", {"prompt": "hi", "max_tokens": 3}),
            ("/v1/responses", {"input": "hi", "max_output_tokens": 16}),
        ):
            status, answer = post(http, url, {"model": name, **body})
            assert status == 200, answer
            limit = {"/v1/responses": 7 if own else 16}.get(url, 3)
            assert told(router) == (theirs if own else ours) | {"max_tokens": limit}, url
            if url == "/v1/responses":
                assert answer["temperature"] == (0.5 if own else 1.0)
                assert answer["top_p"] == (0.75 if own else 1.0)
        asked = {"temperature": 0, "top_p": 1, "max_tokens": 99}
        post(http, "/v1/chat/completions", {"model": name, "messages": CHAT, **asked})
        assert told(router)["temperature"] == 0.0
        assert told(router)["top_p"] == 1.0
        assert told(router)["max_tokens"] == (7 if own else 99)
        call = router.public.unary_stream(
            GENERATE,
            request_serializer=generate_pb2.GenerateRequest.SerializeToString,
            response_deserializer=generate_pb2.GenerateResponse.FromString,
        )
        request = generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=[1, 2, 3]))
        list(call(request, timeout=20))
        assert told(router)["temperature"] == (0.5 if own else 0.0)
        assert told(router)["top_k"] == (20 if own else 0)
    finally:
        router.close()


def post(http: Http, url: str, body: dict[str, Any]) -> tuple[int, Any]:
    answer = http.post(url, body)
    return answer.status, answer.json
