"""The `engine:` section of the configuration: one model replica."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


def groups_in_one_way(groups: Collection[str]) -> tuple[str, ...]:
    """Of `quantized_groups`: the same for the same layers. In order, and without experts beside mlp, which has them."""
    return tuple(sorted({*groups} - ({"experts"} if "mlp" in groups else set[str]())))


class SpeculationConfig(BaseModel):
    """docs/speculation.md"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["off", "lookup", "draft", "mtp"] = Field(
        default="off",
        description="Tokens are drafted for running answers, and the model verifies several at a time. Answers are the "
        "same. lookup = drafts are what followed the last tokens when they came before in the prompt or the answer. "
        "draft = a smaller model says them. mtp = the checkpoint's own prediction head does (DeepSeek-V3, GLM-4.5).",
    )
    model: str = Field(
        default="",
        description="The draft model, for draft: a directory or a hub id, with the vocabulary of the model itself. Its "
        "KV takes its share of the KV memory.",
    )
    max_tokens: int = Field(
        default=7, ge=1, le=64, description="Drafts for a sequence in one step, at most; fewer where they do not pay."
    )
    least_match_tokens: int = Field(
        default=2, ge=2, le=16, description="How many of the last tokens must have come before, for lookup."
    )

    @field_validator("method", mode="before")
    @classmethod
    def _yaml_words(cls, value: Any) -> Any:
        """Without quotes YAML takes off for a boolean."""
        return "off" if value is False else value

    @model_validator(mode="after")
    def _a_draft_model_where_one_drafts(self) -> SpeculationConfig:
        if self.method == "draft" and not self.model:
            raise ValueError(
                "speculation.method is draft and no model is named; set speculation.model to a smaller one"
            )
        if self.method != "draft" and self.model:
            raise ValueError(
                f"speculation.model is for the method draft, and the method is {self.method}; set it to draft, or drop "
                "the model"
            )
        return self


class AdaptersConfig(BaseModel):
    """docs/adapters.md"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, str] = Field(
        default_factory=dict,
        description="LoRA adapters: the name in requests, and a directory in PEFT's format. Layers run one by one "
        "then, not as one native call.",
    )
    slots: int = Field(
        default=8,
        ge=1,
        le=256,
        description="So many different adapters compute at a time; memory for them is taken at start. The others wait.",
    )
    max_rank: int = Field(
        default=0,
        ge=0,
        le=512,
        description="Room in each slot is for adapters of this rank, in every layer that one may target, so that more "
        "can be loaded while the worker serves. 0: for those of `models` alone.",
    )
    most: int = Field(
        default=64,
        ge=1,
        le=4096,
        description="So many adapters a worker has at most, with those that are kept for answers that began on them.",
    )
    host_mb: int = Field(
        default=1024,
        ge=0,
        description="Weights are kept in host memory up to this, the most recently used ones: a slot is filled from "
        "there, not from disk, and files may change or go.",
    )
    directories: tuple[str, ...] = Field(
        default=(),
        description="While the worker serves, adapters are loaded from below these directories alone. Empty: from "
        "anywhere that it can read.",
    )

    @property
    def enabled(self) -> bool:
        return bool(self.models) or self.max_rank > 0

    @field_validator("models")
    @classmethod
    def _names(cls, models: dict[str, str]) -> dict[str, str]:
        for name in models:
            if not name.strip() or len(name) > 256:
                raise ValueError(f"an adapter's name has 1 to 256 characters, and one is {name!r}")
        return models


class EngineConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(default="embedded", description='A directory, a hub id, or "embedded" for the small model.')
    served_model_name: str = Field(
        default="", description="Name of the model in requests; empty = last part of the model's path."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Data type of weights, and of KV without kv_dtype; auto = the checkpoint's.",
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    kernels: Literal["auto", "native", "torch"] = Field(
        default="auto",
        description="On CPU: our own kernels, compiled for this machine at first start (needs a C++ compiler). auto = "
        "if they compile and agree with transformers in a trial; native = refuse to start otherwise; torch = never. On "
        "CUDA: auto = fused Triton kernels for the work between matrix products and attention, if they pass a trial "
        "(not yet run on a GPU); torch = transformers' own layers.",
    )
    attention: Literal["auto", "native", "gather", "triton", "flashinfer", "flash_attn"] = Field(
        default="auto",
        description="Attention kernels; auto = on CUDA the first of triton, flashinfer and flash_attn that is "
        "installed and passes a trial, native on CPU, else gather.",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="On CUDA with triton attention: replay decode steps as CUDA graphs. Shapes are recorded "
        "while the worker is idle, and checked against the eager step; not yet run on a GPU.",
    )
    async_scheduling: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Plan and launch the next step while one computes. Answers are the same; requests with grammars "
        "or penalties still run one step after the other. auto = on for CUDA (not yet run on a GPU), off on CPU.",
    )
    speculation: SpeculationConfig = Field(default_factory=SpeculationConfig)
    quantization: Literal["none", "int8", "int4", "fp8"] = Field(
        default="none",
        description="Weights in so many bits (fp8 = E4M3), one scale for 128 of them, rounded at start. Other answers "
        "than without: all workers of a cluster must have the same, unless router.mixed_quantization is set. "
        "docs/quantization.md.",
    )
    quantized_groups: tuple[Literal["mlp", "experts", "attention", "head"], ...] = Field(
        default=("mlp",),
        min_length=1,
        description="Which layers quantization is for: mlp = feed-forward blocks, the experts of a mixture among them; "
        "experts = these alone; attention = its projections; head = the last product, not the embedding.",
    )
    adapters: AdaptersConfig = Field(default_factory=AdaptersConfig)
    kv_dtype: Literal["model", "int8", "int8_values", "fp8", "fp8_values"] = Field(
        default="model",
        description="How keys and values are kept; model = in dtype. int8 = each token's key and value of a head in 8 "
        "bits with a scale of its own; fp8 = likewise, in E4M3; int8_values, fp8_values = values alone. Other answers "
        "than without: all workers of a cluster must have the same. docs/quantization.md.",
    )
    tensor_parallel: Literal[1, 2, 4, 8] = Field(
        default=1,
        description="Over how many processes (ranks) of this machine the model is split; on CUDA each has a device of "
        "its own (not yet run on a GPU). docs/parallelism.md.",
    )
    expert_parallel: Literal[1, 2, 4, 8] = Field(
        default=1,
        description="Into how many groups of these ranks the experts of a mixture are split by number; within a group "
        "each expert is split by its inner width. Divides tensor_parallel; equal to it = whole experts.",
    )
    block_tokens: int = Field(default=32, ge=1, le=1024, description="Tokens in one KV block; the same on all workers.")
    num_blocks: int | None = Field(
        default=None, ge=1, description="Size of the KV pool; unset = by kv_memory_fraction."
    )
    kv_memory_fraction: float = Field(
        default=0.8,
        gt=0,
        lt=1,
        description="Share of the memory that is free after loading; on CPU, of 1 GiB.",
    )
    max_batch_tokens: int = Field(
        default=512, ge=1, description="Token budget of one step: the chunk size of long prompts."
    )
    itl_target_ms: float | None = Field(
        default=None,
        ge=0,
        description="Target for the inter-token latency of running answers: while decodes run, prompts are computed "
        "in chunks that keep a step within 0.8 of it. Unset: a cluster takes the router's itl_target_ms. 0: off.",
    )
    max_running_sequences: int = Field(default=128, ge=1)
    max_waiting_sequences: int = Field(default=1024, ge=1)
    context_limit_tokens: int | None = Field(default=None, ge=2, description="Prompt plus answer; unset = the model's.")
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of the model; unset = torch's default, and no more than affinity and quota allow.",
    )
    pin_threads: str = Field(
        default="auto",
        pattern=r"^(auto|off|\d+(-\d+)?(,\d+(-\d+)?)*)$",
        description="Processors of the native kernels' threads, one per thread: numbers (0,2-3); off; or auto = bound "
        "if the process may use exactly as many processors as it has threads.",
    )

    batch_invariant: bool = Field(
        default=False,
        description="The logits of a sequence do not depend, to the last bit, on the rest of the batch, on chunk sizes "
        "or on where its KV was computed. Holds for one kind of machine, dtype and number of threads. Tested on CPU "
        "in float32 and bfloat16. Slower: see benchmarks/README.md.",
    )

    @field_validator("quantized_groups")
    @classmethod
    def _said_in_one_way(cls, groups: tuple[str, ...]) -> tuple[str, ...]:
        return groups_in_one_way(groups)

    @field_validator("async_scheduling", "pin_threads", mode="before")
    @classmethod
    def _yaml_words(cls, value: Any) -> Any:
        """Without quotes YAML takes on and off for booleans, and a processor for a number."""
        if isinstance(value, bool):
            return "on" if value else "off"
        return str(value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _key_tiles_are_whole_blocks(self) -> EngineConfig:
        if self.kernels == "torch" and self.attention == "native":
            raise ValueError("attention cannot be native while kernels is torch; set kernels to auto")
        if self.batch_invariant and self.attention in ("triton", "flashinfer", "flash_attn"):
            raise ValueError(
                "batch_invariant has attention of its own; leave attention at auto, or drop batch_invariant"
            )
        if self.batch_invariant and 512 % self.block_tokens:
            raise ValueError(
                f"batch_invariant needs block_tokens that divide 512, and block_tokens is {self.block_tokens}; use 32"
            )
        return self

    @model_validator(mode="after")
    def _ranks_fit(self) -> EngineConfig:
        ranks = self.tensor_parallel
        if ranks % self.expert_parallel:
            raise ValueError(
                f"expert_parallel ({self.expert_parallel}) does not divide tensor_parallel ({ranks}); it counts groups "
                "of these ranks"
            )
        if ranks > 1 and self.async_scheduling == "on":
            raise ValueError(
                "steps of several ranks do not overlap; set async_scheduling to auto, or tensor_parallel to 1"
            )
        if ranks > 1 and self.speculation.method != "off":
            raise ValueError(
                "speculation is not offered over several ranks; set tensor_parallel to 1, or speculation.method to off"
            )
        if ranks > 1 and self.quantization != "none" and "head" in self.quantized_groups:
            raise ValueError(
                "the head is not quantized over several ranks; set tensor_parallel to 1, or take head out of "
                "quantized_groups"
            )
        if ranks > 1 and self.batch_invariant:
            raise ValueError(
                "batch_invariant is not offered over several ranks; set tensor_parallel to 1, or batch_invariant to "
                "false"
            )
        if ranks > 1 and ":" in self.device:
            raise ValueError(f"tensor_parallel is {ranks}, and device names one device ({self.device}); set it to cuda")
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> EngineConfig:
        if not self.adapters.enabled:
            return self
        if len(self.adapters.models) > self.adapters.most:
            raise ValueError(
                f"adapters.models has {len(self.adapters.models)}, and adapters.most is {self.adapters.most}; raise it"
            )
        for wanted, name, off in (
            (self.tensor_parallel > 1, "tensor_parallel", "1"),
            (self.quantization != "none", "quantization", "none"),
            (self.batch_invariant, "batch_invariant", "false"),
            (self.speculation.method in ("draft", "mtp"), f"speculation.method {self.speculation.method}", "off"),
        ):
            if wanted:
                raise ValueError(
                    f"adapters are not offered with {name}; set it to {off}, or take out adapters.models and max_rank"
                )
        return self

    @model_validator(mode="after")
    def _every_running_sequence_needs_a_token(self) -> EngineConfig:
        if self.max_running_sequences > self.max_batch_tokens:
            raise ValueError(
                f"max_running_sequences ({self.max_running_sequences}) exceeds max_batch_tokens "
                f"({self.max_batch_tokens}); every running sequence needs a token a step, so lower the first"
            )
        return self
