"""What is not generation: models, tokens, health, and what HTTP asks of any server."""

from __future__ import annotations

import pytest

from tests.support.raw_http import Http

MODEL = "smollm2-135m-instruct"


def test_models_are_listed_and_shown(http: Http) -> None:
    listed = http.get("/v1/models").json
    assert listed["object"] == "list"
    model, alias = listed["data"]
    assert (alias["id"], http.get("/v1/models/small").json) == ("small", alias)
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", 8192)
    assert http.get(f"/v1/models/{MODEL}").json == model
    missing = http.get("/v1/models/gpt-9/large")
    assert missing.status == 404
    assert missing.error["code"] == "model_not_found"
    assert MODEL in missing.error["message"]


def test_health_and_version(http: Http) -> None:
    assert http.get("/health").json == {"status": "ok"}
    assert "version" in http.get("/version").json
    assert "diptych_requests_live" in http.get("/metrics").body.decode()
    assert http.get("/ui/scaling").json["points"] is not None


def test_tokenize_and_back(http: Http) -> None:
    answer = http.post("/tokenize", {"model": MODEL, "prompt": "hello world", "return_token_strs": True}).json
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == 2
    assert answer["max_model_len"] == 8192
    assert http.post("/detokenize", {"tokens": answer["tokens"]}).json == {"prompt": "hello world"}
    chat = http.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json
    assert "<|im_start|>assistant" in http.post("/detokenize", {"tokens": chat["tokens"]}).json["prompt"]
    tokens = http.post("/tokenize", {"prompt": "a", "add_special_tokens": False}).json["tokens"]
    assert tokens == http.post("/tokenize", {"prompt": "a"}).json["tokens"]  # this tokenizer adds none
    asked = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "add_special_tokens": False}
    assert http.post("/tokenize", {**asked, "continue_final_message": False}).json == chat
    bare = http.post("/tokenize", {**asked, "add_generation_prompt": False}).json["tokens"]
    assert chat["tokens"][: len(bare)] == bare
    assert "assistant" not in http.post("/detokenize", {"tokens": bare[-5:]}).json["prompt"]
    begun = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, I"}]}
    tokens = http.post("/tokenize", {**begun, "continue_final_message": True}).json["tokens"]
    assert http.post("/detokenize", {"tokens": tokens}).json["prompt"].endswith("<|im_start|>assistant\nWell, I")
    tool = {"type": "function", "function": {"name": "weather"}}
    assert http.post("/tokenize", {**asked, "tools": [tool]}).json["count"] > chat["count"]
    long = "word " * 8_000
    tokens = http.post("/tokenize", {"prompt": long}).json["tokens"]
    assert http.post("/detokenize", {"tokens": tokens}).json == {"prompt": long}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt", "either prompt or messages"),
        ("/tokenize", {"promt": "a"}, "promt", "did you mean prompt?"),
        ("/tokenize", {"prompt": 7}, "prompt", "valid string"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template", "a template is a program"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": 1}},
            "chat_template_kwargs",
            "may set",
        ),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ("/detokenize", {"tokens": [1, "2"]}, "tokens[1]", "valid integer"),
        ("/detokenize", {"tokens": [49152]}, "tokens", "vocabulary of 49152"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "vocabulary of 49152"),
        ("/detokenize", {"tokens": [1], "model": "gpt-9"}, "model", MODEL),
        ("/detokenize", [1], None, "JSON list"),
        ("/detokenize", b'{"tokens": [1', None, "not JSON"),
        ("/detokenize", b'{"tokens": [NaN]}', None, "not JSON"),
        ("/tokenize", b'{"prompt": "\\ud800"}', None, "not JSON"),
        ("/tokenize", b'{"prompt": "\xff"}', None, "not JSON"),
        ("/tokenize", b"", None, "not JSON"),
        ("/tokenize", b'{"a":' * 300, None, "not JSON"),
    ],
)
def test_what_does_not_fit_is_named(http: Http, path: str, body: object, param: str | None, words: str) -> None:
    answer = http.post(path, body)
    assert answer.status in (400, 404), answer
    assert answer.error["param"] == param
    assert words in answer.error["message"]


def test_unknown_paths_and_methods(http: Http) -> None:
    missing = http.get("/v1/nothing")
    assert (missing.status, missing.error["code"]) == (404, "unknown_url")
    assert "/v1/models" in missing.error["message"]
    wrong = http.ask("DELETE", "/v1/models")
    assert (wrong.status, wrong.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    assert wrong.error["code"] == "method_not_allowed"
    head = http.ask("HEAD", "/v1/models")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) > 0
    options = http.ask("OPTIONS", "/tokenize")
    assert (options.status, options.headers["allow"]) == (204, "POST, OPTIONS")


def test_pages_of_named_origins_may_call_and_others_not(http: Http) -> None:
    ours = http.get("/v1/models", Origin="https://pages.example")
    assert ours.headers["access-control-allow-origin"] == "https://pages.example"
    before = http.ask("OPTIONS", "/tokenize", headers={"Origin": "https://pages.example"})
    assert "POST" in before.headers["access-control-allow-methods"]
    assert "access-control-allow-origin" not in http.get("/v1/models", Origin="https://evil.example").headers


def test_request_ids_are_echoed(http: Http) -> None:
    assert http.get("/health", **{"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
    assert http.get("/health").headers["x-request-id"] != http.get("/health").headers["x-request-id"]
    for odd in ("x" * 201, "\xe9", ""):  # a proxy's: the client could do nothing about it
        answer = http.get("/health", **{"X-Request-Id": odd})
        assert (answer.status, len(answer.headers["x-request-id"])) == (200, 16)


def test_bodies_and_headers_have_limits(http: Http) -> None:
    body = http.post("/tokenize", b'{"prompt": "' + b"x" * (3 << 20))
    assert body.status == 413
    assert f"limit is {2 << 20}" in body.error["message"]
    chunks = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    said = http.raw(b"POST /tokenize HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + 40 * chunks + b"junk")
    assert said.startswith(b"HTTP/1.1 413 ")
    for head in (b"x: " + b"y" * 5000 + b"\r\n", b"x: y\r\n" * 1000, b"x: " + b"y" * 9000):
        said = http.raw(b"GET /health HTTP/1.1\r\nhost: a\r\n" + head + (b"\r\n" if head.endswith(b"\n") else b""))
        assert said.startswith(b"HTTP/1.1 431 "), said
        assert b'"type":"invalid_request_error"' in said
    assert http.raw(b"GARBAGE\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert http.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").startswith(b"HTTP/1.1 400 ")  # TLS


def test_a_connection_serves_request_after_request(http: Http) -> None:
    with http.socket() as connection:
        for together in (1, 1, 2):  # the last time the second comes before the first is answered
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n" * together)
            said = b""
            while said.count(b'{"status":"ok"}') < together:
                said += connection.recv(65536)
            assert said.count(b"HTTP/1.1 200 ") == together
