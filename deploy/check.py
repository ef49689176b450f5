"""`diptych check MODEL`: whether a model is served, found as a worker finds it, without a cluster.

The checkpoint is loaded and tried; what it would be asked for is then known as well: which path computes it, what of a
token is kept. The tokenizer is loaded as a router does.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from deploy.console import err, fail, out

_BLOCKS = 8  # enough to look at; the trial has pools of its own


def check(
    model: Annotated[str, typer.Argument(help='A directory, a hub id, or "embedded"')],
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto = the checkpoint's")] = "auto",
    context_limit: Annotated[int | None, typer.Option(help="Tokens; unset = the model's own limit", min=1)] = None,
    kv_dtype: Annotated[
        str, typer.Option(help="How keys and values are kept: model, int8, fp8, int8_values or fp8_values")
    ] = "model",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text")] = False,
) -> None:
    """Say whether a model can be served, and how, or why not. Starts no cluster; reads the weights."""
    from pydantic import ValidationError

    from engine.config import EngineConfig

    try:
        config = EngineConfig.model_validate(
            {
                "model": model,
                "dtype": dtype,
                "kv_dtype": kv_dtype,
                "device": device,
                "context_limit_tokens": context_limit,
                "num_blocks": _BLOCKS,
            }
        )
    except ValidationError as error:
        fail("; ".join(f"--{'-'.join(map(str, e['loc']))} is {e['input']!r}: {e['msg']}" for e in error.errors()))
    with _without_warnings():
        found = examine(config)
    if as_json:
        out.print_json(json.dumps(found))
    else:
        for line in described(found):
            out.print(line, soft_wrap=True)
    if not found["served"]:
        if not as_json:
            err.print(f"{model} is not served: {found['reason']}", style="red", soft_wrap=True)
        raise typer.Exit(1)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Of the engine: what is slower is part of the answer."""
    logger = logging.getLogger("engine")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def examine(config: Any) -> dict[str, Any]:
    """The model's row. `served` is false where a worker or a router would refuse it, and `reason` says why."""
    from checkpoint.files import CheckpointError
    from checkpoint.generation import read_description
    from checkpoint.tokenizer import load_tokenizer
    from engine.model_errors import ModelLoadError
    from engine.runner import ModelRunner
    from settings.model_path import ModelPathError, resolve_model

    try:
        directory = resolve_model(config.model)
        read_description(directory)
        runner = ModelRunner(config)
        tokenizer = load_tokenizer(directory)
    except (ModelLoadError, ModelPathError, CheckpointError) as error:
        return {"model": config.model, "served": False, "reason": str(error)}
    groups = runner.facts.groups
    return {
        "model": config.model,
        "served": True,
        "name": runner.facts.name,
        "family": runner.family,
        "path": runner.describe_path(),
        "device": str(runner.device),
        "dtype": runner.facts.dtype,
        "kv_dtype": config.kv_dtype,
        "context_limit_tokens": runner.facts.context_limit_tokens,
        "original_context_tokens": runner.facts.original_context_tokens,
        "groups": [
            {
                "rule": str(group.rule),
                "layers": len(group.layers),
                "kv_heads": 0 if group.rule.state else group.kv_heads,
                "width": 0 if group.rule.state else group.width,
                "bytes_per_token": group.growing_bytes,
                "bytes_per_sequence": group.sequence_bytes,
            }
            for group in groups
        ],
        "bytes_per_token": sum(group.growing_bytes for group in groups),
        "bytes_per_sequence": sum(group.sequence_bytes for group in groups),
        "chat": bool(tokenizer.template),
    }


def _original(tokens: int) -> str:
    return f"; a sequence that grows beyond {tokens} is computed again, by another rotary table" if tokens else ""


def described(found: dict[str, Any]) -> list[str]:
    """For people."""
    if not found["served"]:
        return []
    lines = [
        f"{found['model']} is served",
        f"  family   {found['family']}",
        f"  path     {found['path']}, on {found['device']} in {found['dtype']}",
        f"  context  {found['context_limit_tokens']} tokens{_original(found['original_context_tokens'])}",
        f"  KV       {found['bytes_per_token']} bytes a token, {found['bytes_per_sequence']} bytes a sequence"
        + ("" if found["kv_dtype"] == "model" else f", kept as {found['kv_dtype']}"),
    ]
    for group in found["groups"]:
        layers = f"{group['layers']} layer{'s' if group['layers'] != 1 else ''}"
        shape = f"{group['kv_heads']} x {group['width']}, " if group["width"] else ""
        if group["bytes_per_sequence"]:
            kept = f"{shape}{group['bytes_per_sequence']} bytes a sequence"
        else:
            kept = f"{shape}{group['bytes_per_token']} bytes a token"
        lines.append(f"           {group['rule']}: {layers}, {kept}")
    if not found["chat"]:
        lines.append("  no chat template: completions work, chat is refused; add chat_template.jinja to the directory")
    return lines
