"""A worker without its sockets: the real engine on a small model under the real step loop, and what a router hears."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.overlap import InThread
from engine.runner import ModelRunner
from engine.scheduler import EngineLimits
from worker.core import WorkerCore
from worker.loop import StepLoop
from worker.messages import Command, Ended, Outbox, RouterCommands, RouterConnected

LINK = 1
VOCABULARY, CONTEXT_LIMIT = 512, 256
_BLOCKS = 256


def tiny_checkpoint(path: Path) -> Path:
    """Random weights, the same each time."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LIMIT,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def tiny_runner(path: Path) -> ModelRunner:
    values = {"model": str(path), "dtype": "float32", "num_blocks": _BLOCKS, "threads": 1, "kernels": "torch"}
    return ModelRunner(EngineConfig.model_validate(values | {"block_tokens": 16}))


class LiveWorker:
    """`overlap`: steps are planned ahead."""

    def __init__(self, runner: ModelRunner, *, overlap: bool = False) -> None:
        limits = EngineLimits(16, 64, 16, 4096, CONTEXT_LIMIT, VOCABULARY)
        pool = BlockPool(_BLOCKS, np.zeros(_BLOCKS, dtype=np.uint64))
        self.core = WorkerCore(EngineCore(limits, pool), report_every_s=10.0)
        self.crashes: queue.Queue[BaseException] = queue.Queue()
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Ended] = {}
        self._changed = threading.Condition()
        launcher: Any = InThread(runner) if overlap else None
        self.loop = StepLoop(self.core, runner, self._deliver, self._crashed, launcher=launcher, forget=runner.forget)
        self.loop.post(RouterConnected(LINK))
        self.loop.start()

    def _deliver(self, outbox: Outbox) -> None:
        output = outbox.links.get(LINK)
        if output is None:
            return
        with self._changed:
            for number, position, token in zip(output.sequence_ids, output.positions, output.token_ids, strict=True):
                tokens = self.tokens.setdefault(number, [])
                assert position == len(tokens)
                tokens.append(token)
            self.ends |= {end.sequence_id: end for end in output.ends}
            self._changed.notify_all()

    def _crashed(self, error: BaseException) -> None:
        with self._changed:
            self.crashes.put(error)
            self._changed.notify_all()

    def say(self, *commands: Command) -> None:
        self.loop.post(RouterCommands(LINK, commands))

    def wait_for(self, *numbers: int, timeout_s: float = 60.0) -> None:
        with self._changed:
            done = self._changed.wait_for(
                lambda: not self.crashes.empty() or self.ends.keys() >= set(numbers), timeout_s
            )
        assert self.crashes.empty(), f"an input ended the worker: {self.crashes.queue[0]!r}"
        assert done, f"no end for {sorted(set(numbers) - self.ends.keys())}"

    def close(self) -> None:
        assert self.loop.stop(10)
        assert self.crashes.empty()
        self.core.check()
        assert self.core.is_idle()
        assert self.core.engine.pool.is_idle()
