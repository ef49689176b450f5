"""Small checkpoints: files by hand where nothing need compute, whole models where something must."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 269060552\n"
_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "I16": 2, "I32": 4, "I64": 8}
SIZE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], fill: int = 0) -> Path:
    """Each tensor by type and shape; all bytes are `fill`."""
    table, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = _BYTES[dtype]
        for n in shape:
            size *= n
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes([fill]) * at)
    return path


def saved_model(directory: Path, family: str = "Llama", **changes: Any) -> Path:
    """Random weights. None leaves a field of SIZE out."""
    import torch
    import transformers

    torch.manual_seed(3)
    fields = {name: value for name, value in (SIZE | changes).items() if value is not None}
    config = getattr(transformers, f"{family}Config")(**fields)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def small_model(directory: Path, embedded: Path) -> Path:
    """Random weights behind the embedded model's tokenizer: for tests whose subject is not the model. The same context
    limit and special tokens, a thirtieth of the bytes to load and hardly anything to compute.
    """
    described = json.loads((embedded / "config.json").read_text())
    taken = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    saved_model(
        directory, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.1, tie_word_embeddings=True, **{name: described[name] for name in taken},
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(embedded / name, directory)
    return directory


def saved_tokenizer(directory: Path, **more: Any) -> Any:
    """Byte-level BPE with a chat template; returns transformers' wrapper."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the sky is blue and the sea is green"] * 4, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **more
    )
    wrapped.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}<s>assistant:"
    wrapped.save_pretrained(directory)
    return wrapped


def counting_model(directory: Path, *, stored: str = "float32", max_shard_size: str = "5GB", **changes: Any) -> Path:
    """It answers a token with the next one: embeddings are random, and the head's rows are those one place further."""
    import torch
    import transformers

    torch.manual_seed(3)
    fields = SIZE | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2} | changes
    model: Any = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**fields))
    with torch.no_grad():
        embeddings = torch.nn.functional.normalize(torch.randn(fields["vocab_size"], 128), dim=-1)
        model.model.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.copy_(embeddings.roll(1, 0))
        for layer in model.model.layers:  # which hardly speak
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    model.to(getattr(torch, stored)).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
