"""Models that turn positions by one of two tables (rope type "longrope": Phi-3.5, Phi-4-mini).

1. transformers takes the short table while no position of a call lies beyond the model's original context, else the
   long one for all of them. Its `generate` knows that keys of both do not go together: once a sequence has more tokens
   than the original context, the cache is dropped and all of them are computed again.
2. So the table is a matter of the sequence, not of the call: short up to the original context, long beyond. A sequence
   that outgrows it loses its blocks and is computed again (engine/core.py), and block names tell which table made them.
3. A step packs sequences of both kinds. A long one's positions come to the model moved up by the original context,
   where no short one has any: `choose_by_row` takes the table of each row from that.

    position given     0 ... original - 1     original ... original + limit - 1
    table              short                  long
    position           the same               less `original`
"""

from __future__ import annotations

from typing import Any

import torch

_KIND = "longrope"


def original_context(model: Any, limit: int) -> int:
    """How many tokens a sequence has at most while the short table holds. 0: one table does for all of `limit`; or we
    do not know when the model changes tables, and the trial at start says up to where it is right.
    """
    found = {_original(module) for module in _ropes(model)}
    if len(found) != 1:
        return 0
    original = found.pop()
    return original if 0 < original < limit and _begins_again(model, original) else 0


def choose_by_row(model: Any, original: int) -> None:
    """From here on the model takes a packed row of sequences of both kinds, as described above."""
    for module in _ropes(model):
        module.forward = _by_row(module.forward, original)


def _ropes(model: Any) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "rope_type", None) == _KIND]


def _original(module: Any) -> int:
    stated = (getattr(module.config, "rope_parameters", None) or {}).get("original_max_position_embeddings")
    return stated if isinstance(stated, int) else 0


def _begins_again(model: Any, original: int) -> bool:
    """Whether `generate` computes all of a sequence exactly when that has grown beyond `original` tokens."""
    from transformers import DynamicCache

    def computes(past: int) -> int:
        """How many tokens, when one has come and the cache has `past`."""

        class Past(DynamicCache):
            def get_seq_length(self, *_: Any, **__: Any) -> int:
                return past

        tokens = torch.zeros((1, past + 1), dtype=torch.long)
        given: Any = {"past_key_values": Past(config=model.config.get_text_config()), "next_sequence_length": 1}
        inputs = model.prepare_inputs_for_generation(tokens, **given)
        count, keeps = inputs["input_ids"].shape[1], inputs.get("past_key_values") is not None
        return count if (count == 1) is keeps else 0

    try:
        return [computes(original + n) for n in (-1, 0, 1)] == [1, original + 1, 1]
    except Exception:  # of the model's own code: then we do not know
        return False


def _by_row(inner: Any, original: int) -> Any:
    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        long = position_ids >= original
        short_row = position_ids.masked_fill(long, 0)
        beyond = position_ids.new_full((*position_ids.shape[:-1], 1), original)  # one such position makes it choose
        long_row = torch.cat(((position_ids - original).clamp(min=0), beyond), dim=-1)
        short_angles, long_angles = inner(x, short_row), inner(x, long_row)
        which = long[..., None]
        cos, sin = (torch.where(which, b[..., :-1, :], a) for a, b in zip(short_angles, long_angles, strict=True))
        return cos, sin

    return forward
