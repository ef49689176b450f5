"""A GGUF file becomes the checkpoint that it was made from, or is refused: never another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.convert_slow_tokenizer import bytes_to_unicode

from deploy.convert import ConvertError, converted

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 128}),  # what transformers takes it to be
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp keeps queries and keys of Llama."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def written(path: Path, family: str, **extra: Any) -> Any:
    """A tiny random model, and the file that it is written to. `extra`: `tensor`, `setting`, `without`."""
    kind, more = FAMILIES[family]
    torch.manual_seed(0)
    config = kind(**SIZES, **more)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # biases too
        parameter.data.normal_(0, 0.1)
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(300)
    writer.add_key_length(more.get("head_dim", 8))
    writer.add_value_length(more.get("head_dim", 8))
    if "setting" in extra:
        writer.add_string(*extra["setting"])
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, letters[0] + letters[1], *(f"<extra {n}>" for n in range(299 - len(letters)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_eos_token_id(299)
    writer.add_bos_token_id(298)
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}.get(family, gguf.MODEL_ARCH.QWEN3), 2
    )
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        array = value.float().numpy()
        if family == "llama" and stem.endswith(("q_proj", "k_proj")):
            array = permuted(array, 4 if stem.endswith("q_proj") else 2)
        if name != extra.get("without"):
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(array))
    if "tensor" in extra:
        writer.add_tensor(extra["tensor"], np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_out_is_the_model_that_went_in(tmp_path: Path, family: str) -> None:
    model = written(tmp_path / "a file.gguf", family)
    converted(tmp_path / "a file.gguf", tmp_path / "out", "float32")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    prompt = torch.arange(1, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(back(prompt).logits, model(prompt).logits, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("as it was", add_special_tokens=False)) == "as it was"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a file.gguf", "out"]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"tensor": "rope_freqs.weight"}, "rope_freqs.weight"),
        ({"without": "model.layers.1.mlp.up_proj.weight"}, "lacks weights"),
        ({"setting": ("llama.rope.scaling.type", "yarn")}, "rope.scaling.type"),
    ],
)
def test_what_would_be_another_model_is_refused(tmp_path: Path, extra: dict[str, Any], says: str) -> None:
    written(tmp_path / "a.gguf", "llama", **extra)
    with pytest.raises(ConvertError, match=says):
        converted(tmp_path / "a.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"], "nothing half made is left"


def test_what_is_no_gguf_file_or_of_no_known_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGML and so on")
    with pytest.raises(ConvertError, match="no GGUF file"):
        converted(tmp_path / "a.gguf", tmp_path / "out")
    (tmp_path / "b.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ConvertError, match="broken"):
        converted(tmp_path / "b.gguf", tmp_path / "out")
    with pytest.raises(ConvertError, match="cannot read"):
        converted(tmp_path / "none.gguf", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConvertError, match="exists"):
        converted(tmp_path / "b.gguf", tmp_path / "out")
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConvertError, match="'clip'"):
        converted(tmp_path / "c.gguf", tmp_path / "other")
