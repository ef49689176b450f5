"""What LoRA adapters cost: steps of 32 decodes, and a prompt beside them, with adapters and without.

    python -m benchmarks.adapters

    none configured   the model on the kernels that it has without adapters
    model alone       adapters are configured, and no row asks for one
    1, 8 adapters     every row asks for one, in turns

Adapters are random, of one rank, for all projections. All ways in turns; a ratio is of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.report import median, parse, save, table
from benchmarks.steps import Part, Steps
from engine.adapters.format import TARGETS
from engine.adapters.slots import InSlot
from engine.config import EngineConfig
from engine.model_check import check_model
from engine.runner import ModelRunner
from settings.model_path import resolve_model

_CONFIG = {"peft_type": "LORA", "bias": "none", "use_rslora": False}


def made(model: str, to: Path, rank: int, seed: int) -> str:
    """A random adapter for every projection."""
    checked = check_model(model, "float32", None)
    with torch.device("meta"):
        layers = dict(checked.model_class(checked.config).named_modules())
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for path, layer in layers.items():
        if isinstance(layer, torch.nn.Linear) and path.rpartition(".")[2] in TARGETS:
            begins = f"base_model.model.{path}.lora_"
            tensors[f"{begins}A.weight"] = torch.randn(rank, layer.in_features, generator=generator) * 0.01
            tensors[f"{begins}B.weight"] = torch.randn(layer.out_features, rank, generator=generator) * 0.01
    to.mkdir()
    save_file(tensors, to / "adapter_model.safetensors")
    (to / "adapter_config.json").write_text(json.dumps({**_CONFIG, "r": rank, "lora_alpha": rank}))
    return str(to)


def timed(steps: Steps, parts: list[Part], adapters: int) -> float:
    """Milliseconds of a step, with so many adapters in turns; 0: none."""
    plan = steps.plan(parts)
    if adapters:
        digests = [adapter.digest for adapter in steps.runner.adapters[:adapters]]
        owners = [InSlot(i % adapters, digests[i % adapters]) for i in range(len(plan.items))]
        items = tuple(replace(item, adapter=owner) for item, owner in zip(plan.items, owners, strict=True))
        plan = replace(plan, items=items)
    begun = time.perf_counter()
    steps.runner.execute(plan)
    return (time.perf_counter() - begun) * 1e3


def measured(model: str, dtype: str, threads: int, rank: int, most: int, batch: int, repeats: int) -> dict[str, Any]:
    decodes = [Part(64, 1)] * batch
    shapes = {f"{batch} decodes": decodes, "and a prompt of 256": [*decodes, Part(0, 256)]}
    base = {"model": model, "dtype": dtype, "threads": threads, "num_blocks": 4 * batch + 16, "device": "cpu"}
    with tempfile.TemporaryDirectory() as home:
        models = {f"a{i}": made(model, Path(home) / f"a{i}", rank, i) for i in range(most)}
        plain = Steps(ModelRunner(EngineConfig.model_validate(base)))
        given = {"adapters": {"models": models, "slots": most}}
        adapted = Steps(ModelRunner(EngineConfig.model_validate(base | given)))
        ways: dict[str, Callable[[list[Part]], float]] = {
            "none configured": lambda parts: timed(plain, parts, 0),
            "model alone": lambda parts: timed(adapted, parts, 0),
            "1 adapter": lambda parts: timed(adapted, parts, 1),
            f"{most} adapters": lambda parts: timed(adapted, parts, most),
        }
        times: dict[str, dict[str, list[float]]] = {shape: {way: [] for way in ways} for shape in shapes}
        for number in range(repeats + 1):
            for shape, parts in shapes.items():
                for way, run in ways.items():
                    ms = run(parts)
                    if number:  # the first loads and warms up
                        times[shape][way].append(ms)
        kernels = {"none configured": plain.runner.describe_path(), "others": adapted.runner.describe_path()}
    found = {
        shape: {
            way: {
                "ms": median(ms),
                "to_none_configured": median([a / b for a, b in zip(each["none configured"], ms, strict=True)]),
                "to_model_alone": median([a / b for a, b in zip(each["model alone"], ms, strict=True)]),
            }
            for way, ms in each.items()
        }
        for shape, each in times.items()
    }
    for shape, each in found.items():
        rows = [
            (way, f"{row['ms']:.1f}", f"{row['to_none_configured']:.2f}", f"{row['to_model_alone']:.2f}")
            for way, row in each.items()
        ]
        table((shape, "ms", "of none configured", "of model alone"), rows)
    return {"kernels": kernels, "steps": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    a = parse(parser, repeats=1, adapters=2, batch=2)
    torch.set_num_threads(a.threads)
    model = str(resolve_model(a.model))
    found = measured(model, a.dtype, a.threads, a.rank, a.adapters, a.batch, a.repeats)
    save("adapters", {"dtype": a.dtype, "threads": a.threads, "rank": a.rank, **found})


if __name__ == "__main__":
    main()
