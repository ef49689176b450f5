"""Models over two ranks, in float32, token for token against transformers `generate` over the same weights.

    two CUDA devices or more   a device for each rank, NCCL for the sums: what a worker does
    one                        NCCL does not let two ranks share a device. Both compute on it all the same, and gloo
                               carries the sums through main memory. A worker does not do that: it refuses
    --device cpu               gloo

`ran` says which. Each model is saved first, since every rank reads its part from the files. KV is not handed over here.
Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_check.attention import exact_float32
from benchmarks.gpu_check.context import Check, CheckFailed, significant
from benchmarks.gpu_check.engine import compare, generated
from benchmarks.gpu_check.families import FAMILIES
from benchmarks.gpu_check.models import EXACT, Model, answer, build, prompt_of

RANKS = 2
OF_THEIR_OWN = "NCCL, two GPUs"
SHARED = "gloo through main memory, two ranks on one GPU (NCCL allows one rank on a device)"
ON_CPU = "gloo, CPU"
_LENGTHS, _TINY_LENGTHS = (1, 33, 129, 300), (1, 50)
# With the groups that their experts are in: beside heads, a mixture with windows, and latents.
_MODELS: list[tuple[Model, int]] = [
    (EXACT, 1),
    *((f, RANKS) for f in FAMILIES if f.made_of == "GptOssConfig"),
    *((f, 1) for f in FAMILIES if f.made_of == "DeepseekV3Config"),
]


def ranks(check: Check, found: dict[str, Any]) -> None:
    lengths = _TINY_LENGTHS if check.tiny else _LENGTHS
    new_tokens = 6 if check.tiny else 32
    way = way_of(check)
    found["ran"] = way
    found["problems"] = problems = list[str]()
    rows = []
    for model, groups in _MODELS[:2] if check.tiny else _MODELS:
        if check.left_s() <= 0:
            found.setdefault("left_out", []).append(f"{model.name}: the time was over")
            continue
        prompts = [prompt_of(n, model.vocab, seed=n) for n in lengths]
        with exact_float32(), tempfile.TemporaryDirectory() as directory:
            plain = build(model, check.device, torch.float32, "sdpa" if model is EXACT else None)
            plain.save_pretrained(directory)
            expected = [generated(plain, check.device, p, new_tokens) for p in prompts]
            with over_ranks(check, directory, groups, way) as runner:
                chunked = answer(runner, prompts, new_tokens, 37)
                begun = time.perf_counter()
                answers = {"chunked": chunked, "batched": answer(runner, prompts, new_tokens, 2048)}
                took_s = time.perf_counter() - begun
            own: dict[str, Any] = {"expert_groups": groups, "seconds": significant(took_s, 3)}
            for how, given in answers.items():
                right, wrong = compare(plain, check.device, prompts, expected, given)
                own[how] = f"{right} of {len(prompts)} exact"
                problems += [f"{model.name}, {how}, {what}" for what in wrong]
                rows.append((model.name, groups, how, f"{right} of {len(prompts)}"))
        found[model.name] = own
    check.say(f"ranks: {way}")
    check.table(("two ranks against generate, float32", "groups of experts", "way", "answers exact"), rows)
    if problems:
        raise CheckFailed("; ".join(problems[:5]))


def way_of(check: Check) -> str:
    if not check.on_gpu:
        return ON_CPU
    return OF_THEIR_OWN if torch.cuda.device_count() >= RANKS else SHARED


@contextlib.contextmanager
def over_ranks(check: Check, directory: str, groups: int, way: str) -> Iterator[Any]:
    """A worker's runner."""
    from engine.config import EngineConfig
    from engine.runner import ModelRunner

    config = EngineConfig.model_validate(
        {
            "model": directory,
            "dtype": "float32",
            "device": check.device.type,
            "num_blocks": 200,
            "tensor_parallel": RANKS,
            "expert_parallel": groups,
            **check.engine_options(),
        }
    )
    with contextlib.ExitStack() as stack:
        if way == SHARED:
            stack.enter_context(mock.patch("engine.runner.device_of", _the_only_device))
            stack.enter_context(mock.patch("engine.ranks.leader.start_process", _start_beside))
        runner = ModelRunner(config)
        stack.callback(runner.close)
        yield runner


def _the_only_device(*_: Any) -> torch.device:
    return torch.device("cuda", 0)


def _start_beside(_: int, descriptors: list[int]) -> subprocess.Popen[bytes]:
    """In place of engine.ranks.leader.start_process: a rank that shares the leader's device."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "benchmarks.gpu_check.ranks", *map(str, descriptors), str(os.getpid())]
    return subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL, env=environment)


def main() -> int:
    from engine.ranks import follower

    with mock.patch("engine.runner.device_of", _the_only_device):
        return follower.main(*map(int, sys.argv[1:]))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
