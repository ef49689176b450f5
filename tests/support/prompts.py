"""Prompts of known lengths, and what plain transformers answers to them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

# Plain words, so that a small model stays in the domain it knows.
_WORDS = (  # noqa: SIM905
    "the sky is blue because light from the sun meets small parts of air and is sent out in all directions while "
    "water runs down from the hills into the sea and people who live near it build boats of wood to catch fish "
    "every morning before they sell them on the market where the price of bread has gone up again this year"
).split()


def text_of(num_words: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(_WORDS) for _ in range(num_words))


def tokens_of(tokenizer: Any, num_tokens: int, seed: int) -> list[int]:
    """Exactly `num_tokens` token ids of plain text."""
    ids = tokenizer(text_of(num_tokens * 2 + 8, seed), add_special_tokens=False)["input_ids"]
    assert len(ids) >= num_tokens
    return list(ids[:num_tokens])


def clear_choice(logits: Any) -> int:
    """The greedy token of a row. Rounding is some 1e-6 of the logits' spread, whatever library rounds: a choice that is
    clearer by far is the same on every processor, and another prompt must be found where it is not.
    """
    best = logits.topk(2)
    margin = float((best.values[0] - best.values[1]) / logits.std())
    assert margin > 1e-4, f"a near-tie ({margin:.1e} of the logits' spread): change the prompt or the seed"
    return int(best.indices[0])


def reference_model(path: str) -> Any:
    """Plain transformers in float32, untouched by anything of ours. Read again when other files are at `path`."""
    return _read(path, max(file.stat().st_mtime_ns for file in Path(path).iterdir()))


@lru_cache(maxsize=1)
def _read(path: str, _written: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def forget_reference() -> None:
    """Gives its memory back."""
    _read.cache_clear()


def reference_greedy(path: str, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Greedy answer of `model.generate`, with its end-of-sequence token if it came."""
    import torch

    model = reference_model(path)
    with torch.inference_mode():
        ids = torch.tensor([list(prompt)])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=model.config.eos_token_id,
        )
    return out[0, len(prompt) :].tolist()
