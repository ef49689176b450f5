"""Linear layers whose result for a row does not depend on how many rows come with it, to the last bit.

oneDNN and MKL choose kernel, blocking and split of threads by the number of rows. At one fixed number of rows they
choose once, and a row's result depends neither on its place nor on the others: so rows go through in tiles of
TILE_ROWS, the last one padded. Holds for one machine and one number of threads.

Latent attention multiplies queries and answers by its heads' matrices (engine/latent.py), in tiles as well.

The routers of mixtures multiply by themselves, and go through in the same tiles, whole. Experts on native kernels
(engine/native/experts.py) are invariant as they are; in torch they are not, and the model is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

from engine.attention.interface import LATENT
from engine.latent import LatentHeads
from engine.merged_linear import MERGED

TILE_ROWS = 32


class NotInvariantError(Exception):
    """The model multiplies where we cannot fix the number of rows; the message names the place."""


def tiled_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in], weight [out, in] -> [..., out], like torch's linear."""
    rows = x.reshape(-1, x.shape[-1])
    missing = -len(rows) % TILE_ROWS
    if missing:
        rows = pad(rows, (0, 0, 0, missing))
    if len(rows) == TILE_ROWS:
        out = linear(rows, weight, bias)
    else:
        out = torch.cat([linear(tile, weight, bias) for tile in rows.split(TILE_ROWS)])
    return out[: len(out) - missing].view(*x.shape[:-1], -1)


def tiled_by_heads(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x [1, heads, rows, in], weights [heads, in, out] -> [1, heads, rows, out]: all heads at once, rows in tiles."""
    missing = -x.shape[2] % TILE_ROWS
    tiles = [tile @ weights for tile in pad(x, (0, 0, 0, missing)).split(TILE_ROWS, dim=2)]
    return torch.cat(tiles, dim=2)[:, :, : x.shape[2]]


def make_linears_invariant(model: Any) -> int:
    """Sends every linear layer of `model` through tiles; returns how many. Raises NotInvariantError."""
    count = 0
    for name, module in model.named_modules():
        latent: LatentHeads | None = module.__dict__.get(LATENT)
        if latent is not None:
            latent.multiply_by(tiled_by_heads)
        if isinstance(module, MERGED):
            setattr(module, "linear", tiled_linear)  # noqa: B010
            count += 1
        elif type(module) is nn.Linear:
            setattr(module, "forward", _Tiled(module))  # noqa: B010, it shadows the class's own
            count += 1
        elif is_router(module):
            setattr(module, "forward", _TiledRows(name, module))  # noqa: B010
            count += 1
        elif not isinstance(module, nn.Embedding) and any(p.dim() > 1 for p in module.parameters(recurse=False)):
            raise NotInvariantError(f"{name} ({type(module).__name__}) is no plain linear layer")
    return count


def is_router(module: nn.Module) -> bool:
    """Chooses experts, with a matrix of its own."""
    own = any(p.dim() > 1 for p in module.parameters(recurse=False))
    return own and type(module).__name__.endswith(("Router", "Gate", "Gating"))


class _TiledRows:
    """Stands in for the forward of a module that takes rows and gives tensors of as many."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name, self._module, self._forward = name, module, module.forward

    def __call__(self, x: torch.Tensor) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        missing = -len(rows) % TILE_ROWS
        found = [self._forward(tile) for tile in pad(rows, (0, 0, 0, missing)).split(TILE_ROWS)]
        if isinstance(found[0], torch.Tensor):
            return self._joined(found, len(rows))
        return tuple(self._joined(parts, len(rows)) for parts in zip(*found, strict=True))

    def _joined(self, tiles: Any, count: int) -> torch.Tensor:
        if any(tile.shape[0] != TILE_ROWS for tile in tiles):
            raise NotInvariantError(f"{self._name} ({type(self._module).__name__}) gives other rows than it takes")
        return torch.cat(tiles)[:count]


class _Tiled:
    """Stands in for a layer's forward; looks its weight up each time, for it may move to another device."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return tiled_linear(x, self._layer.weight, self._layer.bias)
