"""What the trial at start costs (engine/position_trial.py): seconds of the reference, and of one path held against it.

python -m benchmarks.trial [--threads 1]

The embedded model, then small random ones: how it grows with layers, and with the window that excerpts reach over.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers

from benchmarks.report import parse, save
from engine.attention.gather import GatherBackend
from engine.attention.grouped import GroupedBackend
from engine.attention.interface import ATTENTION_NAME, register
from engine.forward import TorchForward
from engine.kv_shape import KvShape
from engine.model_probe import attention_layers, groups_of
from engine.position_trial import disagreement, take_reference
from settings.model_path import resolve_model

_LIMIT = 131_072
_BLOCK_TOKENS = 32


def seconds(model: Any, described: dict[str, Any], dtype: torch.dtype, limit: int) -> dict[str, Any]:
    device = torch.device("cpu")
    layers = attention_layers(model, device, limit)
    begun = time.process_time(), time.perf_counter()
    reference = take_reference(model, described, dtype, limit, layers)
    taken = time.process_time(), time.perf_counter()
    shape = KvShape(groups_of(layers, str(dtype).removeprefix("torch.")), _BLOCK_TOKENS)
    backend: Any = GatherBackend()
    if not shape.is_plain:
        backend = GroupedBackend(shape.groups, [GatherBackend() for _ in shape.groups])
    off = disagreement(TorchForward(model, backend), reference, shape, device)
    assert not off, off
    tried = time.process_time(), time.perf_counter()
    return {
        "layers": len(layers),
        "dtype": str(dtype).removeprefix("torch."),
        "excerpts": len(reference.excerpts),
        "most_held_tokens": max(e.place.past.held for e in reference.excerpts),
        "reference_processor_s": round(taken[0] - begun[0], 2),
        "path_processor_s": round(tried[0] - taken[0], 2),
        "reference_s": round(taken[1] - begun[1], 2),
        "path_s": round(tried[1] - taken[1], 2),
    }


def random_model(layers: int, window: int | None, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    config = transformers.MistralConfig(
        vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=_LIMIT, sliding_window=window,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=dtype)
    return model.eval().requires_grad_(False), config.to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parse(parser, threads=1)
    torch.set_num_threads(arguments.threads)
    register()
    rows: list[dict[str, Any]] = []
    if not arguments.smoke:
        for dtype in (torch.float32, torch.bfloat16):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                resolve_model("embedded"), dtype=dtype, attn_implementation=ATTENTION_NAME
            )
            found = seconds(model.eval().requires_grad_(False), model.config.to_dict(), dtype, 8192)
            rows.append({"model": "embedded", **found})
            print(rows[-1], flush=True)
    for layers, window in ((1, None), (2, 64)) if arguments.smoke else (
        (8, None), (16, None), (32, None), (8, 1024), (8, 4096), (8, 16_384), (8, 32_768),
    ):  # fmt: skip
        model, described = random_model(layers, window, torch.bfloat16)
        rows.append({"model": "random", "window": window, **seconds(model, described, torch.bfloat16, _LIMIT)})
        print(rows[-1], flush=True)
    save("trial", {"threads": arguments.threads, "rows": rows})


if __name__ == "__main__":
    main()
