"""Tokenizers as they are published: without a chat template, with tokens that the model lacks, of models that see."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diptych.inference import open_inference_pb2

from router.config import RouterConfig
from tests.support.checkpoints import SIZE, saved_tokenizer
from tests.support.doors import CHATS, EVERY, TEXTS, Doors
from tests.support.in_process_router import InProcessRouter
from tests.support.raw_http import Http

SEES = (
    "{% for m in messages %}<s>{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% else %}<image>{% endif %}{% endfor %}</s>{% endfor %}<s>assistant:"
)
Made = Callable[..., tuple[InProcessRouter, Doors]]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    routers: list[InProcessRouter] = []

    def make(*, vocab_size: int = 300, template: str | None = "", **config: Any) -> tuple[InProcessRouter, Doors]:
        """`template` "": a usual one; None: there is none."""
        path = tmp_path / "tiny"
        wrapped = saved_tokenizer(path)
        if template != "":
            wrapped.chat_template = template
            (path / "chat_template.jinja").unlink()
            wrapped.save_pretrained(path)
        described = SIZE | {"model_type": "llama", "vocab_size": vocab_size} | config
        (path / "config.json").write_text(json.dumps(described))
        settings = RouterConfig(model=str(path), grpc_port=0, http_port=0, internal_port=0)
        routers.append(InProcessRouter(settings, vocab_size=vocab_size))
        running = routers[-1].router
        assert running.http is not None
        return routers[-1], Doors(Http(running.http.port), routers[-1].public, running.dispatcher.model_name)

    yield make
    for router in routers:
        router.close()


def test_a_token_that_the_model_lacks_is_refused_at_every_door(made: Made) -> None:
    """A tokenizer of 290 tokens before a model of 100: an added token, whose embedding is nowhere."""
    router, doors = made(vocab_size=100)
    fields = {
        "chat completions": "messages", "responses": "input", "completions": "prompt", "Generate with a chat": "chat",
        "Generate with text": "text", "ModelInfer": "text",
    }  # fmt: skip
    for door in EVERY:
        refusal = doors.ask(door, "Ünknown").refusal
        assert refusal is not None, door
        status, field, said = refusal
        assert status in ("400", "INVALID_ARGUMENT")
        assert field == fields[door], door
        assert "which is not in the model's vocabulary of 100; leave out what spells it" in said
    assert doors.ask("completions", "AB").finish == "length"
    assert not router.worker.starts[-1].emitted


def test_without_a_chat_template_chats_are_refused_and_texts_answered(made: Made) -> None:
    _, doors = made(template=None)
    for door in CHATS:
        refusal = doors.ask(door, "hi").refusal
        assert refusal is not None, door
        status, field, said = refusal
        assert status in ("400", "INVALID_ARGUMENT")
        assert field in ("messages", "input", "chat")
        assert "has no chat template; send text or token ids (over HTTP to /v1/completions), or add" in said
    for door in TEXTS:
        assert doors.ask(door, "hi", max_tokens=3).finish == "length", door


def test_a_template_that_walks_through_parts_shows_what_was_said(made: Made) -> None:
    """Of a string it would show nothing, and nobody would hear of it."""
    router, doors = made(template=SEES)
    for door in CHATS:
        assert doors.ask(door, "the sky", max_tokens=3).finish == "length"
        prompt = memoryview(router.worker.starts[-1].prompt).cast("I").tolist()
        shown = router.router.dispatcher.tokenizer.backend.decode(prompt, skip_special_tokens=False)
        assert shown == "<s>user: the sky</s><s>assistant:", door


def test_images_are_refused_at_every_door_with_field_and_fix(made: Made) -> None:
    _, doors = made(template=SEES)
    picture = {"url": "data:image/png;base64,AAAA"}
    chat = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": picture}]}]}
    legacy = {"messages": [{"role": "user", "content": "what is it?", "images": ["AAAA"]}]}
    asked = {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}
    for path, body, field, words in (
        ("/v1/chat/completions", chat, "messages[0].content[0].type", "'image_url' is not supported; send text"),
        ("/v1/chat/completions", legacy, "messages[0].images", "text only"),
        ("/v1/responses", asked, "input[0].content[0].type", "'input_image' is not supported; send text"),
        ("/tokenize", chat, "messages[0].content[0].type", "'image_url' is not supported; send text"),
        ("/v1/completions", {"prompt": "a", "multi_modal_data": {"image": "x"}}, "multi_modal_data", "leave it out"),
        ("/v1/completions", {"prompt": {"prompt": "a", "multi_modal_data": {}}}, "prompt", "a string, a list"),
    ):
        found = doors.http.post(path, {"model": doors.model, **body})
        assert found.status == 400, (path, found)
        assert found.error["param"] == field
        assert words in found.error["message"]
    request = open_inference_pb2.ModelInferRequest(model_name=doors.model)
    for name, content in (("text_input", b"what is it?"), ("image", b"AAAA")):
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(content)
    refusal = doors.infer(request).refusal
    assert refusal is not None
    assert refusal[:2] == ("INVALID_ARGUMENT", "inputs")
    assert "'image'" in refusal[2]
    assert "; " in refusal[2]
