"""A tokenizer that is loaded without torch is the one that AutoTokenizer loads."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.by_transformers import copies, load_apart, load_here
from checkpoint.files import CheckpointError, read_optional
from checkpoint.loaded_tokenizer import LoadedTokenizer
from checkpoint.tokenizer import PLAIN_CLASSES, PLAIN_MODELS, is_plain, load_tokenizer
from tests.support.checkpoints import SIZE, saved_tokenizer
from tests.support.tiny_tokenizers import BY_TOKEN, BY_WINDOW

CHAT = [{"role": "user", "content": "Why is the sky blue? <|im_end|>"}, {"role": "assistant", "content": "Ü 😀"}]
TEXTS = (
    "Why is the sky blue? <s>",
    "  Zwei Wörter,\n\tund 東京 😀 don't <think> two words 12345",
    "",
    "the cat sat n't.",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZE}))
    saved_tokenizer(tmp_path)
    return tmp_path


def edit(path: Path, file: str, **fields: Any) -> None:
    """None takes a field out."""
    content = read_optional(path / file) | fields
    (path / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def plain(path: Path) -> bool:
    return is_plain(path, read_optional(path / "tokenizer.json"))


def is_what_transformers_loads(loaded: LoadedTokenizer, path: Path) -> None:
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(path)
    their_backend = theirs.backend_tokenizer
    their_backend.no_truncation()
    their_backend.no_padding()
    assert loaded.backend.to_str() == their_backend.to_str()
    assert loaded.backend.encode_special_tokens == their_backend.encode_special_tokens
    assert loaded.eos_token_id == theirs.eos_token_id
    assert loaded.template.special_tokens == theirs.special_tokens_map
    assert loaded.template.stated == (theirs.chat_template or "")
    assert loaded.backend.get_vocab_size() == len(theirs)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert loaded.backend.encode(text, add_special_tokens=special).ids == ids, text
            shown = theirs.decode(ids, skip_special_tokens=special)
            assert loaded.backend.decode(ids, skip_special_tokens=special) == shown
    if loaded.template:
        assert loaded.template.render(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False)


def test_the_embedded_models(model_path: Path) -> None:
    assert plain(model_path)
    is_what_transformers_loads(load_tokenizer(str(model_path)), model_path)


@pytest.mark.parametrize("family", PLAIN_MODELS)
def test_a_plain_one_of_every_family_that_is_said_to_have_it(path: Path, family: str) -> None:
    """transformers chooses the class by the family, too."""
    (path / "config.json").write_text(json.dumps({"model_type": family}))
    for name in PLAIN_CLASSES:
        edit(path, "tokenizer_config.json", tokenizer_class=name)
        assert plain(path)
        is_what_transformers_loads(load_tokenizer(str(path)), path)


@pytest.mark.parametrize("kind", [*BY_TOKEN, *BY_WINDOW])
def test_a_plain_one_of_every_kind(path: Path, kind: str) -> None:
    (BY_TOKEN | BY_WINDOW)[kind]().save(str(path / "tokenizer.json"))
    edit(path, "tokenizer_config.json", eos_token="</s>", bos_token="<s>", pad_token=None)
    assert plain(path)
    is_what_transformers_loads(load_tokenizer(str(path)), path)


def with_its_tokens_listed(path: Path) -> None:
    added = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
    edit(path, "tokenizer_config.json", added_tokens_decoder={str(t.pop("id")): t for t in added})
    edit(path, "special_tokens_map.json", eos_token="<s>")


def with_a_template_in_its_configuration(path: Path) -> None:
    (path / "chat_template.jinja").unlink()
    edit(path, "tokenizer_config.json", chat_template="{{ messages[0].content }}{{ eos_token }}")


PLAIN_WAYS: dict[str, Callable[[Path], object]] = {
    "without more": lambda path: None,
    "its tokens are listed": with_its_tokens_listed,
    "a template in its configuration": with_a_template_in_its_configuration,
    "an empty template": lambda path: (path / "chat_template.jinja").write_text(""),
    "a template with other line ends": lambda path: (path / "chat_template.jinja").write_bytes(b"a\r\n{{ bos_token }}"),
    "special tokens are split": lambda path: edit(path, "tokenizer_config.json", split_special_tokens=True),
    "a beginning that it would add": lambda path: edit(path, "tokenizer_config.json", add_bos_token=True),
    "an end that it would add": lambda path: edit(path, "tokenizer_config.json", add_eos_token=True),
    "a blank in front": lambda path: edit(path, "tokenizer_config.json", add_prefix_space=True),
    "no names": lambda path: edit(path, "tokenizer_config.json", bos_token=None, eos_token=None, pad_token=None),
    "more special tokens": lambda path: edit(path, "tokenizer_config.json", extra_special_tokens=["<pad>"]),
    "more of them, as it was": lambda path: edit(path, "tokenizer_config.json", additional_special_tokens=["<pad>"]),
    "spaces that decoding would tidy": lambda path: edit(
        path, "tokenizer_config.json", clean_up_tokenization_spaces=True
    ),
}


@pytest.mark.parametrize("way", PLAIN_WAYS)
def test_what_its_configuration_may_say_of_a_plain_one(path: Path, way: str) -> None:
    PLAIN_WAYS[way](path)
    assert plain(path)
    is_what_transformers_loads(load_tokenizer(str(path)), path)


def with_other_flags(path: Path) -> None:
    with_its_tokens_listed(path)
    content = json.loads((path / "tokenizer_config.json").read_text())
    content["added_tokens_decoder"]["1"]["lstrip"] = True
    (path / "tokenizer_config.json").write_text(json.dumps(content))


def with_several_templates(path: Path) -> None:
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")


OTHER_WAYS: dict[str, Callable[[Path], object]] = {
    "a class of its own": lambda path: edit(path, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer"),
    "no class": lambda path: edit(path, "tokenizer_config.json", tokenizer_class=None),
    "another family": lambda path: edit(path, "config.json", model_type="qwen2"),
    "a token that is not there": lambda path: edit(path, "tokenizer_config.json", bos_token="<bos>"),
    "one of its own more": lambda path: edit(path, "tokenizer_config.json", extra_special_tokens=["<image>"]),
    "one by name": lambda path: edit(path, "tokenizer_config.json", extra_special_tokens={"image_token": "<pad>"}),
    "one by its own name": lambda path: edit(path, "tokenizer_config.json", image_token="<pad>"),
    "other names in another file": lambda path: edit(path, "special_tokens_map.json", eos_token="<s>"),
    "more tokens in another file": lambda path: edit(path, "added_tokens.json", **{"<new>": 281}),
    "other flags": with_other_flags,
    "several templates": with_several_templates,
    "several in a list": lambda path: edit(
        path, "tokenizer_config.json", chat_template=[{"name": "default", "template": "{{ messages }}"}]
    ),
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_what_may_mean_more_is_left_to_transformers(path: Path, way: str) -> None:
    OTHER_WAYS[way](path)
    assert not plain(path)
    is_what_transformers_loads(load_here(path), path)
    assert load_tokenizer(str(path)).backend.to_str() == load_here(path).backend.to_str()


def test_code_of_the_models_own_is_not_run(path: Path) -> None:
    edit(path, "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Slow", "code.Fast"]})
    (path / "code.py").write_text("raise SystemExit")
    assert not plain(path)
    assert load_tokenizer(str(path)).backend.encode("the sky").ids


@pytest.mark.parametrize("kind", [*BY_TOKEN, *BY_WINDOW])
def test_a_copy_between_processes_is_the_same(kind: str) -> None:
    assert copies((BY_TOKEN | BY_WINDOW)[kind]())


def test_a_process_that_ends_loads_what_this_one_would(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(path, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", split_special_tokens=True)
    with_several_templates(path)
    with caplog.at_level(logging.INFO):
        loaded = load_apart(path)
    assert "needs transformers: it is loaded in a process of its own" in caplog.text
    is_what_transformers_loads(loaded, path)
    here = load_here(path)
    assert (loaded.template.stated, loaded.template.special_tokens) == (
        here.template.stated,
        here.template.special_tokens,
    )


def stand_in(path: Path, monkeypatch: pytest.MonkeyPatch, says: dict[str, Any]) -> None:
    """In place of the process."""
    script = path / "python"
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(says)}\nEND\n")
    script.chmod(0o755)
    monkeypatch.setattr("checkpoint.by_transformers.sys.executable", str(script))


def test_what_that_process_refuses_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(path, monkeypatch, {"refused": "the tokenizer is cut short; copy it again"})
    with pytest.raises(CheckpointError, match=r"^the tokenizer is cut short; copy it again$"):
        load_apart(path)


def test_what_cannot_be_copied_is_loaded_here(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(path, monkeypatch, {"copies": False})
    is_what_transformers_loads(load_apart(path), path)
    assert "cannot be copied between processes: this one keeps transformers" in caplog.text


def test_a_process_that_is_killed_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint.by_transformers.sys.executable", shutil.which("false"))
    with pytest.raises(CheckpointError, match="ended with 1; its last lines are above"):
        load_apart(path)


@pytest.mark.parametrize("name", ["TokenizersBackend", "Qwen2Tokenizer"])
def test_a_router_that_serves_has_imported_neither_torch_nor_transformers(path: Path, name: str) -> None:
    """Whatever the tokenizer's class is."""
    edit(path, "tokenizer_config.json", tokenizer_class=name)
    code = f"""
import asyncio, sys
from router.__main__ import *
from router.config import RouterConfig
from router.server import RunningRouter
from router.text.chat import Chat, ChatMessage
async def serve():
    router = RunningRouter(RouterConfig(model={str(path)!r}, grpc_port=0, http_port=0, internal_port=0))
    await router.start()
    tokenizer = router.dispatcher.tokenizer
    assert tokenizer.encode_chat(Chat([ChatMessage("user", "hello <s>")]))
    tokenizer.build_llguidance()
    await router.stop()
asyncio.run(serve())
print(sorted({{"torch", "transformers", "PIL", "scipy", "ray"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
