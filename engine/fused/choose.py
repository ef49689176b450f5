"""Whether a model runs on fused kernels, decided at start: does it fit, is Triton there, and does a trial agree.

The trial (engine/position_trial.py) also compiles the kernels before the first request.
"""

from __future__ import annotations

from typing import Any

from engine.attention.grouped import GroupedBackend
from engine.attention.interface import AttentionBackend
from engine.forward import TorchForward
from engine.kv_shape import KvShape
from engine.position_trial import Reference, disagreement


def fused_model(
    model: Any, backend: AttentionBackend | GroupedBackend, heads: int, shape: KvShape, reference: Reference
) -> Any | str:
    """A model to call in place of `model`, or why there is none."""
    try:
        from engine.fused import model as fused
    except ImportError as error:
        return f"triton does not load ({error})"
    group = shape.groups[0]
    why = fused.obstacle(model, group.width)
    if why is not None:
        return why
    try:
        made = fused.FusedModel(model, heads, group.kv_heads)
        return disagreement(TorchForward(made, backend), reference, shape, next(model.parameters()).device) or made
    except Exception as error:  # Triton raises its own kinds, and a model's parts may be called in other ways
        return f"its trial failed ({type(error).__name__}: {str(error).strip()[:300]})"
