"""Which latent attention is taken over, and which is refused because it is not what it seems."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine.attention.interface import AttentionRefused, Extras, attending, paged_attention
from engine.latent import serve_latent
from engine.model_errors import ModelLoadError

HEADS, NOPE, ROTARY, VALUE, LATENT = 3, 4, 2, 5, 6


class Attention(nn.Module):
    """As transformers has it, without all that comes before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_idx = 0
        self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = LATENT, NOPE, ROTARY, VALUE
        self.kv_b_proj = nn.Linear(LATENT, HEADS * (NOPE + VALUE), bias=False)

    def expand_kv(self, latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expanded = self.kv_b_proj(latent[0, 0]).view(1, -1, HEADS, NOPE + VALUE).transpose(1, 2)
        keys, values = expanded.split((NOPE, VALUE), dim=-1)
        return torch.cat((keys, rotary.expand(-1, HEADS, -1, -1)), dim=-1), values

    def forward(self, query: torch.Tensor, latent: torch.Tensor, rotary: torch.Tensor, step: Any) -> torch.Tensor:
        keys, values = self.expand_kv(latent, rotary)
        with attending(step):
            return paged_attention(self, query, keys, values, None, 0.5)[0]


class RotaryFirst(Attention):
    def expand_kv(self, latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().expand_kv(latent, rotary)
        return keys.roll(ROTARY, dims=-1), values


class ValuesFirst(Attention):
    def expand_kv(self, latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().expand_kv(latent, rotary)
        return keys, values * 2


class NormOfKeys(Attention):
    def forward(self, query: torch.Tensor, latent: torch.Tensor, rotary: torch.Tensor, step: Any) -> torch.Tensor:
        keys, values = self.expand_kv(latent, rotary)
        keys = keys / keys.norm()
        with attending(step):
            return paged_attention(self, query, keys, values, None, 0.5)[0]


class WithBias(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.kv_b_proj = nn.Linear(LATENT, HEADS * (NOPE + VALUE))


class WithoutExpansion(Attention):
    expand_kv = None  # type: ignore[assignment]


class Indexed(Attention):
    def __init__(self, topk: int | None) -> None:
        super().__init__()
        self.indexer = nn.Identity()
        if topk is not None:
            self.indexer.index_topk = topk  # type: ignore[assignment]


class Step:
    """One sequence from its beginning, with all that is given kept."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, extras: Extras
    ) -> torch.Tensor:
        assert key.shape[1:] == (1, query.shape[2], LATENT + ROTARY)
        values = key[..., :LATENT].expand(-1, HEADS, -1, -1)
        keys = key.expand(-1, HEADS, -1, -1)
        scaled = nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
        return scaled.transpose(1, 2)


def model_of(*layers: nn.Module, **config: Any) -> nn.Module:
    model = nn.Sequential(*layers)
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config))  # type: ignore[assignment]
    return model


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(1, HEADS, tokens, NOPE + ROTARY, generator=generator),
        torch.randn(1, 1, tokens, LATENT, generator=generator),
        torch.randn(1, 1, tokens, ROTARY, generator=generator),
    )


@torch.inference_mode()
def test_attention_over_what_is_kept_is_attention_over_what_would_be_expanded() -> None:
    layer = Attention()
    query, latent, rotary = inputs(7)
    keys, values = layer.expand_kv(latent, rotary)
    expected = nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=0.5)
    assert serve_latent(model_of(layer, nn.Linear(2, 2)), limit=8) == 1
    answer = layer(query, latent, rotary, Step())
    torch.testing.assert_close(answer, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (RotaryFirst, "expand_kv computes something else"),
        (ValuesFirst, "expand_kv computes something else"),
        (WithBias, "kv_b_proj is no plain linear layer"),
        (WithoutExpansion, "not callable"),
    ],
)
def test_what_is_not_what_it_seems_is_refused(kind: type[Attention], words: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"of a form that is not known \({kind.__name__}: .*{words}"):
        serve_latent(model_of(Attention(), kind()), limit=8)


@torch.inference_mode()
def test_keys_that_are_changed_after_their_expansion_are_refused() -> None:
    layer = NormOfKeys()
    serve_latent(model_of(layer), limit=8)
    with pytest.raises(AttentionRefused, match="changes keys or values after they are expanded"):
        layer(*inputs(2), Step())


def test_a_model_of_heads_is_left_alone() -> None:
    assert serve_latent(model_of(nn.Linear(2, 2), kv_lora_rank=None), limit=8) == 0


def test_a_configuration_that_names_a_latent_which_no_layer_has_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="latent attention of a form that is not known"):
        serve_latent(model_of(nn.Linear(2, 2), kv_lora_rank=6), limit=8)


def test_an_indexer_goes_where_it_would_pick_every_token() -> None:
    model = model_of(Indexed(8), Indexed(9))
    assert serve_latent(model, limit=8) == 2
    assert [layer.indexer(1, x=2) for layer in model] == [None, None]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([Indexed(8), Indexed(9)], "looks at 8 tokens that it picks .* set engine.context_limit_tokens to at most 8$"),
        ([Indexed(None)], "in a way that is not known"),
    ],
)
def test_an_indexer_that_would_leave_tokens_out_is_refused(layers: list[nn.Module], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        serve_latent(model_of(*layers), limit=9)
