"""Which adapters an engine serves, and whether its model can take them: decided once, at start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.adapters.format import Adapter, read_adapter
from engine.adapters.kept import KeptWeights
from engine.adapters.layers import AdapterLayers, Shapes
from engine.config import EngineConfig
from engine.model_errors import AdapterError
from engine.types import PlanItem, SamplingParams, StepPlan
from kv_transfer.layout import Group


def read_adapters(config: EngineConfig) -> tuple[Adapter, ...]:
    """Of engine.adapters. Raises AdapterError."""
    return tuple(read_adapter(name, directory) for name, directory in config.adapters.models.items())


def adapter_layers(
    config: EngineConfig, adapters: Sequence[Adapter], model: Any, shapes: Shapes, groups: Sequence[Group]
) -> AdapterLayers | None:
    """None: there are no adapters. Raises AdapterError."""
    if not config.adapters.enabled:
        return None
    if any(group.kind != "heads" or group.rule.state for group in groups):
        raise AdapterError(
            "adapters are served for models whose layers all have plain attention, and this one has others (recurrent "
            "or latent); take engine.adapters out"
        )
    given = config.adapters
    layers = AdapterLayers(model, shapes, adapters, given.slots, given.max_rank, KeptWeights(given.host_mb << 20))
    layers.keep_first()
    return layers


def look_at_layers(adapters: AdapterLayers, execute: Callable[[StepPlan], object], first_blocks: Sequence[int]) -> None:
    """Before anything is served: blocks are nobody's yet. `first_blocks`: of each group, and where the last one ends.
    Raises AdapterError where an adapter would not reach what is computed.
    """
    tokens = (0, 0)
    item = PlanItem(
        *(0, tokens, 0, (0,), True, 0, SamplingParams(), len(tokens), tokens),
        others=[(first,) for first in first_blocks[1:-1]],
    )
    with adapters.looking(len(tokens)):
        execute(StepPlan(0, (item,)))
