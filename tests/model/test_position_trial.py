"""What the trial at start sees over the whole context: models that look at positions, batches or rows in their own
ways, and wrong computations that are planted."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.ministral3 import modeling_ministral3

from engine import model_loader
from engine import runner as runner_module
from engine.attention.gather import GatherBackend, GatherBatch
from engine.attention.grouped import GroupedBackend
from engine.attention.interface import ATTENTION_NAME, PLAIN, Chunk, register
from engine.config import EngineConfig
from engine.forward import TorchForward
from engine.kv_shape import KvShape
from engine.longrope import choose_by_row, original_context
from engine.model_loader import ModelLoadError
from engine.model_probe import groups_of, probe_layers
from engine.native.library import load_library
from engine.native.stack import NativeStack
from engine.position_trial import Reference, disagreement, take_reference
from engine.runner import ModelRunner
from engine.trial_places import named_lengths
from kv_transfer.layout import FULL, Rule

ORIGINAL, LIMIT = 256, 1024
SIZE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": LIMIT, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
    "long_factor": [2 + i / 4 for i in range(8)], "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip


def spread(model: Any) -> Any:
    """Weights wide enough that attention is peaked; biases and norms are not what they begin as."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            wide = p.dim() >= 2 and "embed" not in name
            p.copy_(torch.randn(p.shape, generator=generator) * (1.6 / p.shape[-1] ** 0.5 if wide else 1.0))
    return model


def saved(path: Path, config: Any) -> Path:
    spread(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(path)
    return path


def loaded(path: Path, **settings: Any) -> ModelRunner:
    return ModelRunner(EngineConfig(model=str(path), dtype="float32", num_blocks=8, threads=1, **settings))


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.Phi3Config(
        **SIZE, sliding_window=None, rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL
    )
    return saved(tmp_path_factory.mktemp("longrope"), config)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_angles_by_the_longest_of_a_batch_are_refused_with_the_limit_that_serves(
    longrope: Path, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_loader, "original_context", lambda *_: 0)  # as if nothing were known of it
    with pytest.raises(ModelLoadError, match=f"context_limit_tokens to at most {ORIGINAL}$"):
        loaded(longrope, kernels=kernels)
    assert loaded(longrope, kernels=kernels, context_limit_tokens=ORIGINAL).facts.context_limit_tokens == ORIGINAL


def test_angles_by_the_length_of_each_sequence_are_tried_on_both_sides_of_the_original_context(longrope: Path) -> None:
    runner = loaded(longrope)
    assert runner.facts.original_context_tokens == ORIGINAL
    assert "right at positions 0, 244, 245, 250 and 1012" in str(runner.verdicts)


@pytest.mark.parametrize("off", [-1, 1])
def test_an_original_context_that_is_off_by_one_is_refused(
    longrope: Path, off: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_loader, "original_context", lambda *_: ORIGINAL + off)
    with pytest.raises(ModelLoadError, match="computed wrongly: at positions"):
        loaded(longrope)


def test_queries_scaled_by_position_run_where_they_are_scaled(tmp_path: Path) -> None:
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
        "llama_4_scaling_beta": 0.1,
    }  # fmt: skip
    path = saved(tmp_path, transformers.Ministral3Config(**SIZE, sliding_window=None, rope_parameters=rope))
    runner = loaded(path)
    assert "native stack" not in runner.forward.name
    served, *others = str(runner.verdicts).split("; ")
    assert served == f"{runner.forward.name}: right at positions 0, 250 and 1012"
    if others:  # on CPU
        assert others[0].startswith("native stack: no, at positions 250 to 261 it differs from transformers'")


def test_attention_that_fails_gives_way_to_a_slower_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, transformers.GPT2Config(**SIZE, n_embd=64, n_layer=3, n_head=4, n_positions=LIMIT))
    inner = runner_module.disagreement

    def fails_but_for_gather(forward: Any, *rest: Any) -> str:
        return inner(forward, *rest) if isinstance(forward.backend, GatherBackend) else "it is planted"

    monkeypatch.setattr(runner_module, "disagreement", fails_but_for_gather)
    faster = loaded(path, attention="auto")
    assert faster.forward.name == "torch gather + sdpa"
    served, *others = str(faster.verdicts).split("; ")
    assert served.startswith("torch gather + sdpa: right at positions 0")
    assert any("native paged" in said and said.endswith("no, it is planted") for said in others)
    with pytest.raises(ModelLoadError, match=r"set engine\.attention and engine\.kernels to auto$"):
        loaded(path, attention="native")


def test_positions_that_a_model_counts_by_itself_when_it_generates_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kosmos 2.5 does: nobody tells it positions then, and it begins with another than 0."""
    inner = modeling_gpt2.GPT2Model.forward

    def forward(self: Any, input_ids: torch.Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is None:
            position_ids = torch.arange(2, 2 + input_ids.shape[1])[None]
        return inner(self, input_ids=input_ids, position_ids=position_ids, **kwargs)

    path = saved(tmp_path, transformers.GPT2Config(**SIZE, n_embd=64, n_layer=3, n_head=4, n_positions=LIMIT))
    loaded(path)
    monkeypatch.setattr(modeling_gpt2.GPT2Model, "forward", forward)
    with pytest.raises(ModelLoadError, match="counts positions by itself when it generates"):
        loaded(path)


def test_positions_counted_from_the_packed_row_are_refused(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        **SIZE, intermediate_size_mlp=96, num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=10,
        layer_types=["full_attention"] * 3, no_rope_layers=[1, 1, 0], attn_temperature_tuning=True,
        floor_scale=ORIGINAL,
    )  # fmt: skip
    with pytest.raises(ModelLoadError, match="computed wrongly: at positions"):
        loaded(saved(tmp_path, config))


@dataclass
class Ours:
    """What a plant may spoil: the model in our forward, what its layers keep, and what calls the backend."""

    model: Any
    shape: KvShape
    backend: Any
    monkeypatch: pytest.MonkeyPatch

    def forward(self) -> TorchForward:
        backend = self.backend
        if self.shape.is_plain:
            return TorchForward(self.model, backend)
        return TorchForward(self.model, GroupedBackend(self.shape.groups, [backend] * len(self.shape.groups)))


@functools.cache
def taken(family: str, dtype: torch.dtype) -> tuple[Any, KvShape, Reference]:
    """A model of random weights, what its layers keep, and its reference."""
    register()
    config = getattr(transformers, f"{CLASSES.get(family, family)}Config")(**(SIZE | FAMILIES[family]))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    model = spread(model).to(dtype).eval().requires_grad_(False)
    layers = probe_layers(model, torch.device("cpu"), LIMIT)
    shape = KvShape(groups_of(layers, str(dtype).removeprefix("torch.")), 16)
    original = original_context(model, LIMIT)
    reference = take_reference(model, config.to_dict(), dtype, LIMIT, layers, original)
    if original:
        choose_by_row(model, original)
    return model, shape, reference


WINDOW, CHUNK = 72, 96
CLASSES = {"many layers": "Qwen2"}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "many layers": {"num_hidden_layers": 24},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {
        "sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16, "num_hidden_layers": 4,
    },
    "GptOss": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4},
    "Llama4Text": {
        "intermediate_size_mlp": 96, "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 10,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"], "no_rope_layers": [1, 1, 1],
        "attention_chunk_size": CHUNK, "attn_temperature_tuning": False,
    },
    "SmolLM3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "Phi3": {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL},
    "Ministral3": {
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
            "llama_4_scaling_beta": 0.1,
        },
    },
}  # fmt: skip


def forget_a_bias(ours: Ours) -> None:
    ours.model.model.layers[1].self_attn.v_proj.bias.zero_()


def forget_a_norm(ours: Ours) -> None:
    ours.model.model.layers[2].post_attention_layernorm.weight.fill_(1.0)


def a_norm_elsewhere(ours: Ours) -> None:
    """Of what attention adds, where it should be of what it is given."""
    layer = ours.model.model.layers[1]
    norm, attention = layer.input_layernorm, layer.self_attn.forward
    layer.input_layernorm = torch.nn.Identity()

    def attend(*args: Any, **kwargs: Any) -> Any:
        added, *rest = attention(*args, **kwargs)
        return (norm(added), *rest)

    layer.self_attn.forward = attend


def another_scale(ours: Ours) -> None:
    ours.model.model.layers[1].self_attn.scaling *= 1.1


def another_theta(ours: Ours) -> None:
    ours.model.model.rotary_emb.inv_freq *= 0.999  # seen far from the beginning only


def positions_of_the_row(ours: Ours) -> None:
    inner = ours.model.model.rotary_emb.forward
    ours.model.model.rotary_emb.forward = lambda x, position_ids: inner(x, torch.arange(x.shape[1])[None])


def table_of_the_batch(ours: Ours) -> None:
    """The place of each row is its own, and the table that of the longest."""
    rope = ours.model.model.rotary_emb
    del rope.forward
    inner = rope.forward
    rope.forward = lambda x, position_ids: inner(x, position_ids - ORIGINAL * (position_ids >= ORIGINAL))


def rope_where_there_is_none(ours: Ours) -> None:
    ours.model.model.layers[1].self_attn.use_rope = True


def no_scale_by_position(ours: Ours) -> None:
    ours.monkeypatch.setattr(modeling_ministral3, "get_llama_4_attn_scale", lambda *_: torch.ones(()))


def regrouped(change: Callable[[Rule], Rule]) -> Callable[[Ours], None]:
    def plant(ours: Ours) -> None:
        groups = tuple(replace(group, rule=change(group.rule)) for group in ours.shape.groups)
        ours.shape = KvShape(groups, ours.shape.block_tokens)

    return plant


def longer_window(rule: Rule) -> Rule:
    return replace(rule, window=rule.window and rule.window + 1)


def shorter_window(rule: Rule) -> Rule:
    return replace(rule, window=rule.window and rule.window - 1)


def longer_chunk(rule: Rule) -> Rule:
    return replace(rule, chunk=rule.chunk and rule.chunk + 1)


def shorter_chunk(rule: Rule) -> Rule:
    return replace(rule, chunk=rule.chunk and rule.chunk - 1)


def everything(_: Rule) -> Rule:
    return FULL


def windows_on_other_layers(ours: Ours) -> None:
    one, other = ours.shape.groups
    ours.shape = KvShape((replace(one, layers=other.layers), replace(other, layers=one.layers)), 16)


def attending(**forgotten: Any) -> Callable[[Ours], None]:
    """A backend that leaves something out. `past`: only behind what is cached."""

    def plant(ours: Ours) -> None:
        class Batch(GatherBatch):
            def attend(self, layer: int, query: Any, key: Any, value: Any, scaling: float, extras: Any = PLAIN) -> Any:
                changed = {k: v for k, v in forgotten.items() if k != "scaling"}
                if changed:
                    extras = replace(extras, **changed)
                return super().attend(layer, query, key, value, forgotten.get("scaling", scaling), extras)

        class Backend(GatherBackend):
            def prepare(self, kv: torch.Tensor, chunks: list[Chunk], rule: Rule = FULL) -> GatherBatch:
                return Batch(kv, chunks, rule)

        ours.backend = Backend()

    return plant


PLANTS: list[tuple[str, Callable[[Ours], None]]] = [
    ("Qwen2", forget_a_bias),
    ("Qwen2", forget_a_norm),
    ("Qwen2", a_norm_elsewhere),
    ("Qwen2", another_scale),
    ("Qwen2", positions_of_the_row),
    ("Qwen2", attending(scaling=1.0)),
    ("SmolLM3", rope_where_there_is_none),
    ("Phi3", table_of_the_batch),
    ("Ministral3", no_scale_by_position),
    *((f, regrouped(change)) for f in ("Mistral", "Gemma2", "GptOss") for change in (longer_window, shorter_window)),
    ("Mistral", regrouped(everything)),
    ("Gemma2", windows_on_other_layers),
    ("Gemma2", attending(softcap=0.0)),
    ("GptOss", attending(sinks=None)),
    ("Llama4Text", regrouped(longer_chunk)),
    ("Llama4Text", regrouped(shorter_chunk)),
    ("Llama4Text", regrouped(everything)),
]


def found(family: str, dtype: torch.dtype, plant: Callable[[Ours], None] | None) -> str:
    right, shape, reference = taken(family, dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        ours = Ours(copy.deepcopy(right), shape, GatherBackend(), monkeypatch)
        if plant is not None:
            plant(ours)
        return disagreement(ours.forward(), reference, ours.shape, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_right_passes(family: str, dtype: torch.dtype) -> None:
    assert not found(family, dtype, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "plant"), PLANTS)
def test_a_planted_fault_is_seen(family: str, plant: Callable[[Ours], None], dtype: torch.dtype) -> None:
    assert found(family, dtype, plant)


def a_tenth_more(name: str) -> Callable[[Any], None]:
    def plant(layer: Any) -> None:
        for part in name.split("."):
            layer = getattr(layer, part)
        layer.weight.mul_(1.1)

    return plant


def another_bias(layer: Any) -> None:
    layer.self_attn.v_proj.bias.mul_(0.9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="native kernels are of the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Qwen2", "many layers"])
def test_one_layer_of_the_native_stack_that_is_a_tenth_off_is_seen(family: str, dtype: torch.dtype) -> None:
    right, shape, reference = taken(family, dtype)
    library = load_library(1)

    def found(plant: Callable[[Any], None] | None) -> str:
        model = copy.deepcopy(right)
        if plant is not None:
            plant(model.model.layers[1])
        stack = NativeStack(library, model, shape.groups[0].width, shape.groups[0].kv_heads, LIMIT)
        return disagreement(stack, reference, shape, torch.device("cpu"))

    assert not found(None)
    parts = ("self_attn.o_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    for plant in (*map(a_tenth_more, parts), another_bias):
        assert found(plant).split("layer ")[1].startswith("1 is off by"), plant


def test_angles_that_are_little_off_are_seen_where_nothing_is_rounded() -> None:
    assert found("Qwen2", torch.float32, another_theta)


def test_lengths_are_found_wherever_they_stand() -> None:
    described = {
        "max_position_embeddings": 4096, "hidden_size": 512, "floor_scale": 100, "rms_norm_eps": 1e-5,
        "rope_parameters": {"original_max_position_embeddings": 1024.0, "factor": 4.0, "scaling": True},
        "text_config": {"sliding_window": 300, "attention_chunk_size": 8},
    }  # fmt: skip
    assert named_lengths(described, 4096) == [100, 300, 1024]


def test_a_mixture_whose_rounding_sends_rows_elsewhere_is_no_wrong_model(tmp_path: Path) -> None:
    """In bfloat16 a near tie of the router may go another way, and with it a whole row: at the end, its logits."""
    config = transformers.DeepseekV3Config(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=512, initializer_range=0.14, kv_lora_rank=64,
        q_lora_rank=96, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=8,
        num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=128, first_k_dense_replace=1,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    for seed in (0, 1):
        torch.manual_seed(seed)
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        made.save_pretrained(tmp_path / str(seed))
        runner = ModelRunner(EngineConfig(model=str(tmp_path / str(seed)), dtype="bfloat16", num_blocks=8, threads=1))
        assert runner.facts.dtype == "bfloat16"
