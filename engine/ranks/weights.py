"""A rank's part of a checkpoint: read from the files as it is needed, and never more of it.

1. The model is described without weights, and every parameter gets its cut (engine/ranks/cuts.py).
2. `part_class` is the model's class with smaller parameters: transformers loads it as it loads any other.
3. What it is given to load are `Piece`s: of each stored tensor the rows and columns that this rank keeps. Tensors that
   transformers stacks (one for each expert) are cut before that; those of other ranks' experts are left out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.ranks.cuts import Cut, Cuts, ExpertsCut, Ranges, cuts_of
from engine.ranks.place import CannotSplit, Place

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_DOWN = re.compile(r"\.(down_proj|w2|fc2)\.weight$")
_UP = re.compile(r"\.(gate_proj|up_proj|w1|w3|fc1|fc3)\.weight$")
_STACKED = {"MergeModulelist", "Concatenate"}


class Piece:
    """Of a tensor in a file (safetensors' slice of it): `piece[...]` reads what `cut` keeps."""

    def __init__(self, stored: Any, cut: Cut) -> None:
        self._stored, self._cut = stored, cut

    def get_shape(self) -> list[int]:
        return list(self._cut.shape(tuple(self._stored.get_shape())))

    def get_dtype(self) -> str:
        return self._stored.get_dtype()

    def __getitem__(self, _: Any) -> torch.Tensor:
        dims = len(self._stored.get_shape())
        several = [dim for dim, kept in self._cut.ranges.items() if len(kept) > 1]
        assert len(several) <= 1, "one dimension at most is cut in several places"
        if not several:
            return self._read(dims, {dim: kept[0] for dim, kept in self._cut.ranges.items()})
        apart = several[0]
        whole = {dim: kept[0] for dim, kept in self._cut.ranges.items() if dim != apart}
        parts = [self._read(dims, {**whole, apart: kept}) for kept in self._cut.ranges[apart]]
        return torch.cat(parts, dim=apart)

    def _read(self, dims: int, kept: Mapping[int, tuple[int, int]]) -> torch.Tensor:
        last = max(kept) + 1
        found = self._stored[tuple(slice(*kept[dim]) if dim in kept else slice(None) for dim in range(last))]
        return found.contiguous()


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank loads: `model_class` with the pieces of `take`."""

    cuts: Cuts
    model_class: Any
    transforms: tuple[Any, ...]
    names: frozenset[str]  # of the whole model's parameters and buffers
    prefix: str

    def take(self, name: str, stored: Any) -> Any:
        """The piece of a stored tensor, by the name that transformers is given; None: another rank's. Raises
        CannotSplit.
        """
        target, converter = self._target(name)
        if converter is None:
            cut = self.cuts.parameters.get(target)
            return stored if cut is None else Piece(stored, cut)
        owner = next((path for path in self.cuts.experts if target.startswith(f"{path}.")), None)
        if owner is None:
            if target in self.cuts.parameters:
                raise CannotSplit(f"{name} is stored in a form that is not known here")
            return stored
        return self._of_expert(name, stored, converter, self.cuts.experts[owner])

    def _target(self, name: str) -> tuple[str, Any]:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings: Any = [t for t in self.transforms if isinstance(t, WeightRenaming)]
        converters: Any = [t for t in self.transforms if isinstance(t, WeightConverter)]
        known: Any = dict.fromkeys(self.names, True)
        target, pattern = rename_source_key(name, renamings, converters, self.prefix, known)
        if target not in self.names and name in self.names:
            return name, None
        if pattern is None:
            return target, None
        return target, next(c for c in converters if pattern in c.source_patterns)

    def _of_expert(self, name: str, stored: Any, converter: Any, cut: ExpertsCut) -> Any:
        found = _EXPERT.search(name)
        if found is None or {type(operation).__name__ for operation in converter.operations} - _STACKED:
            raise CannotSplit(f"{name} is stored in a form that is not known here")
        if not cut.first <= int(found[1]) < cut.end:
            return None
        kept: Ranges = (cut.inner,)
        if _DOWN.search(name):
            dim = 1
        elif _UP.search(name):
            dim = 0
        else:
            raise CannotSplit(f"{name} is no weight of an expert that is known here")
        if stored.get_shape()[dim] != cut.width:
            raise CannotSplit(f"{name} has the shape {list(stored.get_shape())}, and {cut.width} was expected")
        return stored if kept == ((0, cut.width),) else Piece(stored, Cut({dim: kept}))


def part_of_model(model_class: Any, config: Any, place: Place) -> Part:
    """Raises CannotSplit."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    with torch.device("meta"):
        whole = model_class(copy.deepcopy(config))
    cuts = cuts_of(whole, place)
    names = frozenset(whole.state_dict())
    transforms = tuple(get_model_conversion_mapping(whole))
    return Part(cuts, part_class(model_class, cuts), transforms, names, whole.base_model_prefix)


def part_class(model_class: Any, cuts: Cuts) -> Any:
    """The class under its own name, for whom transformers looks up things by that."""

    def made(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        shrink(self, cuts)

    return type(model_class.__name__, (model_class,), {"__init__": made, "__module__": model_class.__module__})


def shrink(model: nn.Module, cuts: Cuts) -> None:
    """Parameters without content get the shapes of this rank's part."""
    for name, cut in cuts.parameters.items():
        path, _, own = name.rpartition(".")
        module: Any = model.get_submodule(path)
        old = getattr(module, own)
        new = torch.empty(cut.shape(tuple(old.shape)), dtype=old.dtype, device=old.device)
        setattr(module, own, nn.Parameter(new, requires_grad=old.requires_grad))
        if isinstance(module, nn.Linear) and own == "weight":
            module.out_features, module.in_features = new.shape
    for path, name, value in cuts.attributes:
        setattr(model.get_submodule(path), name, value)
