"""Small models of what is not plain attention, in float32, token for token against transformers `generate`.

Each has the configuration class of a family that is served. All run on the engine's own choice of backends, and over
every backend that serves all of a model's groups.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_check.attention import exact_float32
from benchmarks.gpu_check.backends import serving_groups
from benchmarks.gpu_check.context import Check, CheckFailed
from benchmarks.gpu_check.engine import compare, generated
from benchmarks.gpu_check.models import answer, build, make_runner, prompt_of

WINDOW = 48
_LENGTHS, _TINY_LENGTHS = (1, 33, 70, 300), (1, 70)
_SIZE: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
    "initializer_range": 0.14, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """`rules`: of the groups that the engine must find in it, so that what is checked is what was meant."""

    name: str
    made_of: str  # a configuration class of transformers
    changes: dict[str, Any]
    rules: tuple[str, ...]
    experts: bool = False

    @property
    def vocab(self) -> int:
        return _SIZE["vocab_size"]

    def config(self) -> Any:
        import transformers

        return getattr(transformers, self.made_of)(**(_SIZE | self.changes))


FAMILIES = (
    Family(
        "window, soft cap",
        "Gemma2Config",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 64},
        ("full", f"window({WINDOW})"),
    ),
    Family(
        "window, sinks, experts",
        "GptOssConfig",
        {
            "sliding_window": WINDOW, "num_local_experts": 8, "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        ("full", f"window({WINDOW})"),
        experts=True,
    ),
    Family(
        "chunks, experts",
        "Llama4TextConfig",
        {
            "attention_chunk_size": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 1,
            "intermediate_size_mlp": 256, "interleave_moe_layer_step": 2,
        },
        ("full", f"chunk({WINDOW})"),
        experts=True,
    ),
    Family(
        "latent, experts",
        "DeepseekV3Config",
        {
            "kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
            "num_key_value_heads": 4, "head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
            "topk_group": 1, "moe_intermediate_size": 128, "first_k_dense_replace": 1,
        },
        ("latent full",),
        experts=True,
    ),
    Family(
        "delta rule, experts",
        "Qwen3NextConfig",
        {
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
            "linear_value_head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
        },
        ("full", "state"),
        experts=True,
    ),
    Family(
        "Mamba 2 beside attention",
        "FalconH1Config",
        {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_chunk_size": 32},
        ("full", "state"),
    ),
    Family(
        "two rotary tables",
        "Phi3Config",
        {
            "head_dim": 32, "original_max_position_embeddings": WINDOW,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 16,
                "long_factor": [1.5 + i / 4 for i in range(16)], "original_max_position_embeddings": WINDOW,
            },
        },
        ("full",),
    ),
)  # fmt: skip
TINY_FAMILIES = tuple(f for f in FAMILIES if f.made_of in ("GptOssConfig", "DeepseekV3Config", "FalconH1Config"))


def families(check: Check, found: dict[str, Any]) -> None:
    new_tokens = 4 if check.tiny else 24
    lengths = _TINY_LENGTHS if check.tiny else _LENGTHS
    problems: list[str] = []
    rows: list[tuple[object, ...]] = []
    found["problems"], found["left_out"] = problems, []
    for family in TINY_FAMILIES if check.tiny else FAMILIES:
        if check.left_s() <= 0:
            found["left_out"].append(f"{family.name}: the time was over")
            continue
        own = found[family.name] = {}
        try:
            with exact_float32():
                problems += [f"{family.name}, {p}" for p in check_family(check, family, lengths, new_tokens, own)]
        except Exception:
            problems.append(f"{family.name}:\n{traceback.format_exc()}")
            if not check.device_works():
                found["broke_the_device"] = own.get("backend", "")
                raise
        rows += [(family.name, way, exact) for way, exact in own.get("exact", {}).items()]
        check.say(f"families: {family.name} done, {len(problems)} problems")
        check.free_memory()
    check.table(("families against generate, float32", "way", "answers exact"), rows)
    if problems:
        raise CheckFailed("; ".join(problems[:5]))


def check_family(
    check: Check, family: Family, lengths: tuple[int, ...], new_tokens: int, own: dict[str, Any]
) -> list[str]:
    """What is wrong. `own` gets the findings as they come."""
    prompts = [prompt_of(n, family.vocab, seed=n) for n in lengths]
    plain = build(family, check.device, torch.float32)
    expected = [generated(plain, check.device, p, new_tokens) for p in prompts]
    options = check.engine_options() | {"cuda_graphs": True, "max_running_sequences": 16, "max_batch_tokens": 512}
    runner, _ = make_runner(check.device, family, "float32", 60, **options)
    own |= {"chosen": runner.forward.name, "rules": [str(g.rule) for g in runner.facts.groups], "exact": {}}
    wrong: list[str] = []
    if tuple(own["rules"]) != family.rules:
        wrong.append(f"its groups are {own['rules']}, not {list(family.rules)}")
    if family.experts:
        own["experts"] = sorted(set(runner.expert_load.names)) if runner.expert_load else ["transformers' own loop"]
        if check.on_gpu and own["experts"] != ["grouped_mm"]:
            own["not_there"] = f"grouped products: its experts run on {', '.join(own['experts'])}"
            check.say(f"families: {family.name}: {own['not_there']}")
    served, own["not_served"] = serving_groups(check, runner)
    backends = [("", None), *served] if runner.forward.backend.name not in dict(served) else served
    for name, backend in backends:
        if backend is not None:
            runner.forward.backend = backend
        own["backend"] = label = name or runner.forward.name
        ways = {
            "batched": answer(runner, prompts, new_tokens, 512),
            "chunked, overlapping": answer(runner, prompts, new_tokens, 37, overlap=True),
        }
        for way, answers in ways.items():
            right, differ = compare(plain, check.device, prompts, expected, answers)
            own["exact"][f"{label}, {way}"] = f"{right} of {len(prompts)}"
            wrong += [f"{label}, {way}, {what}" for what in differ]
    return wrong
