"""Checkpoints with a prediction head, and what transformers' own code makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.model.test_families import saved

GROUPED: dict[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.7,
    "initializer_range": 0.2,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {"DeepseekV3": GROUPED | LATENT, "Glm4Moe": GROUPED | {"head_dim": 16}}


def with_head(path: Path, family: str, *, agrees: bool = False, shards: int = 1, drop: str = "") -> Path:
    """`agrees`: model and head say a token by what the one before it is, and so the same. `shards`: files. `drop`: a
    tensor that is left out.
    """
    from safetensors.torch import load_file, save_file

    layers = FAMILIES[family].get("num_hidden_layers", 2)
    saved(path, family, **FAMILIES[family])
    tensors = load_file(path / "model.safetensors")
    deeper = FAMILIES[family] | {"num_hidden_layers": layers + 1}
    # As published: what one more layer of the model would be, and what only heads have beside it.
    other = saved(path / "deeper", family, **deeper)
    own = f"model.layers.{layers}."
    head = {n: t for n, t in load_file(other / "model.safetensors").items() if n.startswith(own)}
    generator = torch.Generator().manual_seed(5)
    hidden = tensors["model.norm.weight"].numel()
    head[f"{own}eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * 0.2
    for name in ("enorm", "hnorm", "shared_head.norm"):
        head[f"{own}{name}.weight"] = 1 + 0.3 * torch.randn(hidden, generator=generator)
    if agrees:
        for name, tensor in (*tensors.items(), *head.items()):
            if name.endswith(("o_proj.weight", "down_proj.weight")) or ".experts." in name:
                tensor.mul_(1e-3)  # layers add next to nothing to what they get
        own_part = torch.eye(hidden)
        head[f"{own}eh_proj.weight"] = torch.cat((own_part, torch.zeros(hidden, hidden)), dim=1)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            head[f"{own}{name}.weight"] = torch.ones(hidden)
    head[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    head[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    head.pop(f"{own}{drop}", None)
    tensors |= head
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = (
        [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    )
    placed = {name: files[i % len(files)] for i, name in enumerate(names)}
    for file in files:
        part = {name: tensors[name].contiguous() for name in names if placed[name] == file}
        save_file(part, path / file, metadata={"format": "pt"})
    if shards > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return path


class PlainHead:
    """The head by plain code: transformers' layers one after the other, no cache, the whole sequence each time."""

    def __init__(self, path: Path) -> None:
        import transformers
        from safetensors.torch import load_file

        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        config = self.model.config
        own = f"model.layers.{config.num_hidden_layers}."
        self.tensors: dict[str, torch.Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            self.tensors |= {n.removeprefix(own): t for n, t in load_file(file).items() if n.startswith(own)}
        deeper: Any = transformers.AutoModelForCausalLM.from_pretrained(path / "deeper", dtype=torch.float32).eval()
        self.layer = deeper.model.layers[-1]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        epsilon = self.model.config.rms_norm_eps
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * self.tensors[f"{name}.weight"]

    def drafts(self, tokens: list[int], count: int, base: int = 0) -> list[int]:
        """What follows `tokens`, the last of which the model has not computed yet. The head begins at row `base`."""
        found: list[int] = []
        with torch.inference_mode():
            ids = torch.tensor([tokens[:-1]])
            states = self.model.model(ids).last_hidden_state[0, base:]  # after the last norm
            for _ in range(count):
                following = torch.tensor([*tokens, *found])[base + 1 :]
                embedded = self.model.model.embed_tokens(following)
                both = torch.cat((self.norm(embedded, "enorm"), self.norm(states, "hnorm")), dim=-1)
                x = (both @ self.tensors["eh_proj.weight"].T)[None]
                places = torch.arange(base, base + len(following))[None]
                mask = torch.full((len(following), len(following)), float("-inf")).triu(1)[None, None]
                out = self.layer(
                    x,
                    position_embeddings=self.model.model.rotary_emb(x, places),
                    attention_mask=mask,
                    position_ids=places,
                )
                made = self.norm(out[0], "shared_head.norm")
                found.append(int(self.model.lm_head(made[-1]).argmax()))
                states = torch.cat((states, made[-1:]))
        return found
