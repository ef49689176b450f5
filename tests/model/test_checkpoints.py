"""What is loaded is what was published, or it is refused by name before any weight is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.model_check import ModelLoadError, check_model
from engine.runner import ModelRunner
from settings.model_path import ModelPathError, model_name, pinned_model, resolve_model
from tests.support.checkpoints import saved_model
from tests.support.families import saved_family

Tensors = dict[str, torch.Tensor]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # kernels are found by DIPTYCH_HOME below
    monkeypatch.setenv("DIPTYCH_HOME", os.environ.get("DIPTYCH_HOME", str(Path.home() / ".cache" / "diptych")))


def change(path: Path, how: Callable[[Tensors], Tensors]) -> Path:
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    changed = {name: tensor.contiguous() for name, tensor in how(load_file(file)).items()}
    file.unlink()  # it may still be mapped
    save_file(changed, file, metadata={"format": "pt"})
    return path


def configure(path: Path, **fields: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return path


def refused(path: Path, limit: int | None = None) -> str:
    with pytest.raises(ModelLoadError) as caught:
        check_model(str(path), "float32", limit)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def runner(path: Path | str, **config: Any) -> ModelRunner:
    return ModelRunner(EngineConfig(model=str(path), dtype="float32", num_blocks=8, threads=1, device="cpu", **config))


NORM = "model.norm.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.0.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("family", "how", "words"),
    [
        ("Llama", lambda w: {n: t for n, t in w.items() if n != "lm_head.weight"}, "lacks .*: lm_head.weight"),
        ("Llama", lambda w: {n: t for n, t in w.items() if n not in (NORM, Q)}, f"{Q}, {NORM}"),
        ("Llama", lambda w: {n: t for n, t in w.items() if ".1." not in n}, "and 6 more"),
        ("Llama", lambda w: w | {"model.extra.weight": torch.ones(3)}, "no place for: model.extra.weight"),
        ("Llama", lambda w: w | {"model.layers.2.mlp.up_proj.weight": torch.ones(3)}, "no place for"),
        ("Llama", lambda w: w | {NORM: torch.ones(33)}, r"model.norm.weight in the shape \[33\] where .* \[32\]"),
        ("Llama", lambda w: w | {Q: w[Q].T.reshape(16, 64)}, r"q_proj.weight in the shape \[16, 64\]"),
        ("Llama", lambda w: w | {Q: w[Q].to(torch.int8)}, "q_proj.weight as I8, which has no meaning without a scale"),
        ("Llama", lambda w: w | {Q: w[Q].to(torch.float8_e4m3fn)}, "q_proj.weight as F8_E4M3"),
        ("Llama", lambda w: w | {f"{Q}_scale_inv": torch.ones(1)}, "a part of quantized weights"),
        ("Llama", lambda w: w | {NORM.removeprefix("model."): torch.ones(32)}, "which are one tensor of the model"),
        ("Qwen3Moe", lambda w: {n: t for n, t in w.items() if n != EXPERT}, "experts"),
        ("Qwen3Moe", lambda w: w | {EXPERT: torch.ones(31, 32)}, "do not fit the model"),
        ("Qwen3Moe", lambda w: w | {EXPERT: w[EXPERT].to(torch.int8)}, "as I8"),
    ],
)
def test_every_tensor_is_there_once_and_as_it_is(
    tmp_path: Path, family: str, how: Callable[[Tensors], Tensors], words: str
) -> None:
    import re

    path = saved_model(tmp_path / "model", family, **(MOE if family == "Qwen3Moe" else {}))
    check_model(str(path), "float32", None)
    said = refused(change(path, how))
    assert re.search(words, said), said
    assert "; " in said
    with pytest.raises(ModelLoadError):
        runner(path)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Gemma", {}),
        ("Qwen3Moe", MOE),
        ("Mixtral", {"num_local_experts": 4}),
        ("Olmo2", {}),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}),
        ("GPTNeoX", {}),
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("Phi3", {}),
    ],
)
def test_complete_checkpoints_raise_no_alarm(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    checked = check_model(str(saved_model(tmp_path, family, **changes)), "float32", None)
    assert checked.model_class.__name__.startswith(family)


def test_old_checkpoints_with_rotary_buffers_are_complete(tmp_path: Path) -> None:
    """Of Llama's first conversions: the model computes them itself."""
    path = change(saved_model(tmp_path), lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    check_model(str(path), "float32", None)


@pytest.mark.parametrize(
    ("family", "changes", "fields", "words"),
    [
        ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}, {}, "from a list of its own"),
        ("Falcon", {"head_dim": None}, {}, "from a list of its own"),
        ("Llama", {}, {"model_type": "nobody"}, "transformers knows no model"),
        ("Llama", {}, {"model_type": "t5"}, "t5 is an encoder-decoder model, .*; choose another model"),
        ("Llama", {}, {"model_type": "bart", "is_encoder_decoder": True}, "bart is an encoder-decoder model, "),
        ("Llama", {}, {"model_type": "blt", "num_hidden_layers": None}, "states no number of layers"),
        ("Llama", {}, {"architectures": ["LlamaForSequenceClassification"]}, "trained for something else.*Sequence"),
        ("Llama", {}, {"architectures": ["BertForMaskedLM"]}, "trained for something else.*MaskedLM"),
        ("Llama", {}, {"hidden_size": "32"}, "config.json"),
        ("Llama", {}, {"num_hidden_layers": [2]}, "config.json"),
        ("Llama", {}, {"rope_parameters": {"rope_type": "mine"}}, "config.json"),
        ("Llama", {}, {"hidden_act": "nothing"}, "config.json"),
        ("Llama", {}, {"num_attention_heads": 0}, "config.json"),
        ("Llama", {}, {"auto_map": {"AutoConfig": "a.B"}, "model_type": "x"}, "a program of its own"),
        ("Llama", {}, {"quantization_config": {"quant_method": "aqlm"}}, "of method aqlm"),
    ],
)
def test_what_can_never_be_served_is_one_sentence(
    tmp_path: Path, family: str, changes: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    import re

    said = refused(configure(saved_model(tmp_path, family, **changes), **fields))
    assert re.search(words, said), said


@pytest.mark.parametrize("limit", [None, 1024, 8])
def test_no_advice_leads_to_the_next_refusal(tmp_path: Path, limit: int | None) -> None:
    """Attention that is the model's own cannot be mended: nobody is sent to the context limit first."""
    bloom = saved_model(tmp_path / "bloom", "Bloom", n_layer=2, n_head=2)
    assert "code of its own" in refused(bloom, limit)


def test_a_window_of_the_cache_alone_is_no_window(tmp_path: Path) -> None:
    """What such a model answers depends on whether transformers keeps a cache: it is served where that is the same."""
    moshi = saved_family(tmp_path, "moshi")
    with pytest.raises(ModelLoadError, match=r"set engine\.context_limit_tokens to at most 16"):
        runner(moshi)
    assert runner(moshi, context_limit_tokens=16).facts.context_limit_tokens == 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="native kernels are of the CPU")
@pytest.mark.parametrize("limit", [2, 8, 69, 70, 256])
def test_any_context_limit_runs_on_the_native_stack(tmp_path: Path, limit: int) -> None:
    assert runner(saved_model(tmp_path), context_limit_tokens=limit).forward.name.startswith("native stack")


@pytest.mark.skipif(torch.cuda.is_available(), reason="native kernels are of the CPU")
def test_rotary_tables_grow_with_what_is_served(tmp_path: Path) -> None:
    """A model of a million positions starts with tables of thousands; a step beyond them computes as before."""
    from engine.attention.interface import Chunk

    path = saved_model(tmp_path, max_position_embeddings=1_010_000, rope_parameters={"rope_type": "default"} | ROPE)
    made: Any = runner(path).forward
    assert len(made._tables[0]) == 8192
    before = [table.clone() for table in made._tables]
    kv = torch.zeros((2, 2, 2, 1, 16384, 16))
    last = 20_000
    logits = made.forward(kv, [5], [last], [Chunk(0, 1, last, [0, 1])], [0])
    assert torch.isfinite(logits).all()
    assert last < len(made._tables[0]) < 50_000
    at_once = made._rope(torch.zeros(1), torch.arange(last + 1)[None])
    for table, old, whole in zip(made._tables, before, at_once, strict=True):
        assert torch.equal(table[:8192], old)
        assert torch.equal(table[: last + 1], whole[0, :, :8])


ROPE = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256} | ROPE


def test_yarn_as_model_cards_describe_it_reaches_its_length(tmp_path: Path) -> None:
    """max_position_embeddings stays what the model was trained on."""
    path = configure(saved_model(tmp_path, "Qwen2"), rope_parameters=YARN)
    assert runner(path).facts.context_limit_tokens == 1024
    assert "the model's limit is 1024; set it to at most 1024" in refused(path, 1025)


def test_a_directory_has_a_name_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved_model(tmp_path / "small-llama")
    monkeypatch.chdir(path)
    assert runner(".").facts.name == "small-llama"
    (path / "inner").mkdir()
    monkeypatch.chdir(path / "inner")
    assert model_name("..") == "small-llama"
    assert pinned_model("..") == str(path)
    assert model_name("/") == "model"
    assert model_name("org/small@v1.0") == "small"


def test_float16_is_served_as_it_is(tmp_path: Path) -> None:
    """Our kernels compute in float32 and bfloat16, and neither holds a checkpoint in float16 as it is: torch does."""
    path = change(configure(saved_model(tmp_path), dtype="float16"), lambda w: {n: t.half() for n, t in w.items()})
    made = ModelRunner(EngineConfig(model=str(path), num_blocks=8, threads=1, device="cpu"))
    assert made.facts.dtype == made.facts.groups[0].dtype == "float16"
    assert made.forward.name == "torch gather + sdpa"


def test_paths_with_spaces_links_and_relative_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved_model(tmp_path / "a place" / "my llama")
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    found = [check_model(name, "float32", None) for name in (str(path), "./a place/my llama", "./link")]
    assert len({checked.model_class for checked in found}) == 1


def test_several_files_are_one_checkpoint(tmp_path: Path) -> None:
    import transformers

    whole = saved_model(tmp_path / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    model.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    checked = check_model(str(tmp_path / "parts"), "float32", None)
    assert len(checked.weights.files) > 1
    assert checked.weights.tensors.keys() == check_model(str(whole), "float32", None).weights.tensors.keys()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in the local cache, with two commits; main is the second."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--acme--tiny"
    for commit, seed in (("a" * 40, 1), ("b" * 40, 2)):
        path = saved_model(repository / "snapshots" / commit)
        change(path, lambda w, seed=seed: {n: t * seed for n, t in w.items()})
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, seed + 5]}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    (repository / "refs" / "v1").write_text("a" * 40)
    return repository


def test_a_hub_id_becomes_a_directory_once(hub: Path) -> None:
    assert resolve_model("acme/tiny") == str(hub / "snapshots" / ("b" * 40))
    assert resolve_model("acme/tiny@v1") == str(hub / "snapshots" / ("a" * 40))
    assert pinned_model("acme/tiny") == "acme/tiny@" + "b" * 40
    assert pinned_model("acme/tiny@v1", weights=False) == "acme/tiny@" + "a" * 40
    assert resolve_model(pinned_model("acme/tiny")) == resolve_model("acme/tiny")
    one, two, same = (runner(m).facts for m in ("acme/tiny", "acme/tiny@v1", "acme/tiny@" + "b" * 40))
    assert one.identity == same.identity != two.identity
    assert {f.name for f in (one, two, same)} == {"tiny"}
    assert model_name(resolve_model("acme/tiny")) == "tiny"


@pytest.mark.parametrize("model", ["acme/none", "acme/tiny@v9", "acme/-odd-"])
def test_a_hub_id_that_is_nowhere_is_one_sentence(hub: Path, model: str) -> None:
    with pytest.raises(ModelPathError, match=r"; .*(name|correct)") as caught:
        resolve_model(model)
    assert "\n" not in str(caught.value)


def test_the_identity_is_of_every_byte(tmp_path: Path) -> None:
    one = saved_model(tmp_path / "one")
    two = tmp_path / "two"
    shutil.copytree(one, two)
    assert runner(one).facts.identity == runner(two).facts.identity
    change(two, lambda w: w | {Q: w[Q] + (torch.arange(w[Q].numel()) == 700).reshape(w[Q].shape)})
    assert runner(one).facts.identity != runner(two).facts.identity
