"""Clusters whose workers have different numbers of ranks, and tiny models of every kind of KV that ranks cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from diptych.v1 import generate_pb2

from engine.config import EngineConfig
from engine.runner import ModelRunner
from engine.types import SamplingParams
from tests.support.checkpoints import saved_model, saved_tokenizer
from tests.support.courses import answer_alone
from tests.support.families import SMALL_LATENT
from tests.support.processes import Cluster, Reply

Degree = tuple[int, int]  # ranks, and the groups of its experts
WINDOW = 40
_HEADS = {"num_attention_heads": 4, "initializer_range": 0.1}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "heads": ("Qwen3", {**_HEADS, "num_key_value_heads": 2}),
    "one head": ("Llama", _HEADS),
    "experts": ("Mixtral", {**_HEADS, "num_key_value_heads": 2, **_EXPERTS}),
    "windows beside full": (
        "GptOss",
        {"num_attention_heads": 4, "sliding_window": WINDOW, "rope_parameters": None, **_EXPERTS},
    ),
    "latent": ("DeepseekV3", {**SMALL_LATENT, "num_attention_heads": 4, "num_key_value_heads": 4}),
}
ENGINE = {
    "num_blocks": 64,
    "block_tokens": 8,
    "max_batch_tokens": 64,
    "max_running_sequences": 16,
    "kernels": "torch",
}
_TRIES = 4


def made_model(directory: Path, name: str, **changes: Any) -> Path:
    family, fields = FAMILIES[name]
    model = saved_model(directory, family, **{**fields, **changes})
    saved_tokenizer(model)
    return model


def prompt_of(length: int, seed: int) -> list[int]:
    return [3 + (i * i * 7 + i * 31 + seed * 101) % 280 for i in range(length)]


@dataclass
class DegreesCluster(Cluster):
    """`degrees`: by the worker's name."""

    degrees: Mapping[str, Degree] = field(default_factory=dict[str, Degree])

    def _worker_config(self, role: str, worker_id: str) -> dict[str, Any]:
        config = super()._worker_config(role, worker_id)
        ranks, groups = self.degrees.get(worker_id, (1, 1))
        config["engine"] |= {"tensor_parallel": ranks, "expert_parallel": groups}
        return config

    def answer(self, prompt: Sequence[int], placement: int, tokens: int, salt: str = "", **sampling: Any) -> Reply:
        params = generate_pb2.SamplingParams(max_tokens=tokens, **sampling)
        return self.ask(self.request(prompt, params, placement, cache_salt=salt or str(placement)))

    def undisturbed(self, prompt: Sequence[int], placement: int, tokens: int, **sampling: Any) -> list[Reply]:
        """Until nobody had to go on with it elsewhere: on a machine that stands still for seconds a worker may be taken
        for lost. What came before is exact all the same, and here as well.
        """
        replies: list[Reply] = []
        while not replies or (replies[-1].finished.recoveries and len(replies) < _TRIES):
            salt = f"{placement}, {len(replies)}"
            replies.append(self.answer(prompt, placement, tokens, salt, **sampling))
        assert not replies[-1].finished.recoveries, f"the KV did not come over\n{self.logs()}"
        return replies


@lru_cache(maxsize=1)
def _runner(model: str) -> ModelRunner:
    return ModelRunner(EngineConfig.model_validate({**ENGINE, "model": model, "dtype": "float32", "threads": 1}))


def alone(model: Path, prompt: Sequence[int], tokens: int, **sampling: Any) -> list[int]:
    """What one process answers, with nothing beside it."""
    return answer_alone(_runner(str(model)), prompt, SamplingParams(max_tokens=tokens, **sampling))
