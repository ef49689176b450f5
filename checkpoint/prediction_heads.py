"""Prediction heads (MTP): layers behind the model's own ones, which say the token after the next.

    model.layers.{num_hidden_layers}.  enorm, hnorm, eh_proj, a decoder layer, shared_head.norm
                                       (and copies of the model's embedding and head: shared_head.head, embed_tokens)

The model's own code has no place for them. engine/prediction_head.py reads them where they are to draft.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_OWN = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.eh_proj\.weight")  # no other layer has it
HEAD_FAMILIES = ("deepseek_v3", "glm4_moe")  # whose heads are known


def heads_of(config: Any) -> int:
    """How many a checkpoint with this configuration of the text may have; 0 for families that are not known."""
    if getattr(config, "model_type", "") not in HEAD_FAMILIES:
        return 0
    count = getattr(config, "num_mtp_layers", 0)
    return count if isinstance(count, int) and count > 0 else 0


def head_prefix(config: Any, head: int = 0) -> str:
    return f"model.layers.{config.num_hidden_layers + head}."


def without_heads(config: Any, names: Iterable[str]) -> list[str]:
    """Names of tensors that are of no prediction head. A layer is one where its eh_proj is there."""
    names, count = list(names), heads_of(config)
    found = (_OWN.fullmatch(name) for name in names) if count else ()
    heads = {int(one[1]) for one in found if one is not None}
    prefixes = tuple(f"model.layers.{n}." for n in heads if 0 <= n - config.num_hidden_layers < count)
    return [name for name in names if not prefixes or not name.startswith(prefixes)]
