"""The engines that benchmarks/engine.py compares, behind one method: run a batch of prompts, say how long it took."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from engine.types import SamplingParams, SequenceSpec

_VLLM_START_S = 240.0
_VLLM_RUN_S = 120.0


class Engine(Protocol):
    name: str

    def run(self, batch: list[list[int]], new_tokens: int) -> float:
        """Seconds until every prompt of the batch has `new_tokens` greedy tokens, whatever they are."""
        ...


class BaselineError(Exception):
    """Names cause and fix."""


class Ours:
    name = "diptych"

    def __init__(self, path: str, dtype: str, threads: int) -> None:
        self.runner = ModelRunner(
            EngineConfig.model_validate({"model": path, "dtype": dtype, "num_blocks": 400, "threads": threads})
        )

    def run(self, batch: list[list[int]], new_tokens: int) -> float:
        limits = EngineLimits(32, 8192, 64, 64, 8192, self.runner.facts.vocab_size)
        core = EngineCore(limits, BlockPool(self.runner.num_blocks))
        for i, prompt in enumerate(batch):
            assert core.add(SequenceSpec(i, prompt, SamplingParams(max_tokens=new_tokens)), 0.0) is None
        begun = time.perf_counter()
        while (plan := core.schedule(0.0)) is not None:
            core.commit(plan, self.runner.execute(plan), 0.0)
        return time.perf_counter() - begun


class Generate:
    name = "transformers generate"

    def __init__(self, path: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.model.eval()

    def run(self, batch: list[list[int]], new_tokens: int) -> float:
        ids = torch.tensor(batch)
        begun = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - begun


class ContinuousBatching:
    name = "transformers continuous batching"

    def __init__(self, path: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="paged|sdpa"
        )
        self.model.eval()

    def run(self, batch: list[list[int]], new_tokens: int) -> float:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        # Left to itself it takes 60 % of the memory that is free.
        sizes = ContinuousBatchingConfig(num_blocks=512, max_batch_tokens=4096)
        begun = time.perf_counter()
        results = self.model.generate_batch(
            inputs=batch, generation_config=config, continuous_batching_config=sizes, progress_bar=False
        )
        elapsed = time.perf_counter() - begun
        assert all(len(r.generated_tokens) == new_tokens for r in results.values())
        return elapsed


class Vllm:
    """vLLM's CPU build, compiled, in its own environment and processes (benchmarks/vllm_child.py)."""

    name = "vllm cpu, compiled"

    def __init__(self, python: str, path: str, dtype: str, threads: int) -> None:
        """Starts it, and returns at once; `wait` before the first run. Raises BaselineError."""
        child = Path(__file__).with_name("vllm_child.py")
        self._log = tempfile.NamedTemporaryFile(prefix="vllm-", suffix=".log", delete=False)  # noqa: SIM115
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        try:
            self._process = subprocess.Popen(
                # -P: the files beside it are not modules that its imports should find
                [python, "-P", str(child), path, dtype, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=clean,
                cwd=child.parent,
                start_new_session=True,  # it starts processes of its own; `stop` ends them all
            )
        except OSError as error:
            raise BaselineError(f"{python} does not run: {error}; make it with benchmarks/vllm_env.sh") from None
        self.version = ""

    def wait(self) -> None:
        self.version = self._answer(_VLLM_START_S)["version"]

    def run(self, batch: list[list[int]], new_tokens: int) -> float:
        assert self._process.stdin is not None
        task = json.dumps({"prompts": batch, "new_tokens": new_tokens})
        self._process.stdin.write(task.encode() + b"\n")
        self._process.stdin.flush()
        return self._answer(_VLLM_RUN_S)["seconds"]

    def stop(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        ready, _, _ = select.select([out], [], [], timeout_s)
        line = out.readline() if ready else b""
        if not line:
            raise BaselineError(f"vLLM gave no answer within {timeout_s:g} s; its log is {self._log.name}")
        return json.loads(line)
