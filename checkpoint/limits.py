"""How long a context may be, as a checkpoint's config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def context_limit(config: Mapping[str, Any], positions: int | None = None) -> int | None:
    """None where the configuration states no limit. `positions`: what it calls max_position_embeddings, if known.

    YaRN multiplies what the model was trained on. Model cards have people add it and leave max_position_embeddings as
    it is; others publish the product there already. The larger of the two is meant.
    """
    text = config.get("text_config")
    text = {**config, **text} if isinstance(text, Mapping) else config
    stated = _whole(text.get("max_position_embeddings") if positions is None else positions)
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if stated is None or not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) != "yarn":
        return stated
    trained, factor = _whole(rope.get("original_max_position_embeddings")), rope.get("factor")
    if trained is None or not isinstance(factor, int | float) or not 1 <= factor <= 1 << 20:
        return stated
    return max(stated, int(trained * factor))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40 else None
