"""What an adapter adds to a model's linear layers: x A^T B^T, for the rows that ask for it.

1. Every projection that some adapter targets gets room for `slots` adapters, once: A [slots, rank, in] and B transposed
   [slots, rank, out]. Smaller ranks are filled up with zeros, which add nothing. With `max_rank` every projection that
   one may target gets room for that rank, and adapters come and go while others compute.
2. A step's rows are sorted by slot (engine/runner.py), so an adapter's rows are a slice. Long slices are computed one
   by one. Short ones next to each other, decodes of many adapters, are computed together: one product with the A of
   all slots, each row's other slots set to zero, one product with all B.
3. A layer is called as before, by whatever code and kernel: what is added is added to its result. Without adapters in
   a step nothing is.

Trusted is only what a pass through the model shows: a projection that the model's code does not call as a layer, with
every row of the step, takes no adapter.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from engine.adapters.format import TARGETS, Adapter, Pairs, read_again, read_with_weights
from engine.adapters.kept import KeptWeights
from engine.adapters.slots import InSlot
from engine.merged_linear import MERGED
from engine.model_errors import AdapterError
from engine.types import PlanItem

_SHORT_ROWS = 32
_HEADER_BYTES = 16 << 20  # beside the weights of a file
_NEWEST = 0.3  # share of the newest measurement in a mean

Shapes = Mapping[str, tuple[int, int]]  # by path: inputs, outputs
Run = tuple[InSlot | None, int, int]  # rows [first, end) of a step


class _Projection:
    """In place of a layer's `forward`."""

    def __init__(self, layer: Any, shape: tuple[int, int], slots: int, rank: int, step: _Step) -> None:
        weight = layer.weight  # it may be empty: packed elsewhere
        self.own = layer.forward
        self.a = weight.new_zeros((slots, rank, shape[0]))
        self.b = weight.new_zeros((slots, rank, shape[1]))
        self._step = step
        self.seen: list[int] = []  # rows of each call, while the model is looked at

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self.own(x)
        step = self._step
        if step.looking:
            self.seen.append(x.numel() // x.shape[-1])
        if not step.spans:
            return out
        rows, to = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        for slot, mask, first, end in step.spans:
            mine = rows[first:end]
            if mask is None:
                to[first:end].addmm_(mine @ self.a[slot].T, self.b[slot])
            else:
                # Filled, not multiplied: what is infinite in another adapter's A would become no number.
                between = (mine @ self.a.flatten(0, 1).T).unflatten(1, (mask.shape[1], -1)).masked_fill_(mask, 0)
                to[first:end].addmm_(between.flatten(1), self.b.flatten(0, 1))
        return out


class _Step:
    """Of the step that computes: (slot, None, first row, end), or (-1, slots that are not a row's, first row, end)."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, torch.Tensor | None, int, int]] = []
        self.looking = False


class AdapterLayers:
    def __init__(
        self,
        model: Any,
        shapes: Shapes,
        adapters: Sequence[Adapter],
        slots: int,
        max_rank: int = 0,
        kept: KeptWeights | None = None,
    ) -> None:
        """`shapes`: of its linear layers. `max_rank`: more may come, of this rank at most; 0: none will. Raises
        AdapterError where an adapter does not fit the model.
        """
        self.first = tuple(adapters)  # those that it begins with
        self.takes_more = max_rank > 0
        self.load_ms = 0.0  # recent mean of filling a slot; 0: none was measured
        self._adapters = {adapter.digest: adapter for adapter in adapters}
        self._kept = kept or KeptWeights(0)
        self._model = model
        self._shapes = shapes
        self._slots = slots
        self._holds: list[str] = [""] * slots
        self._step = _Step()
        self._projections: dict[str, _Projection] = {}
        self._rank = max_rank or max(adapter.rank for adapter in adapters)
        targeted = {path: shapes[path] for adapter in adapters for path in adapter.shapes if path in shapes}
        if max_rank:
            targeted |= {path: shape for path, shape in shapes.items() if path.rpartition(".")[2] in TARGETS}
        for path, shape in targeted.items():
            layer: Any = model.get_submodule(path)
            self._projections[path] = made = _Projection(layer, shape, slots, self._rank, self._step)
            layer.forward = made  # it shadows the class's own
        first = next(iter(self._projections.values()), None)
        if first is None and not adapters:
            raise AdapterError(
                "the model has no linear layer that adapters may target; set engine.adapters.max_rank to 0"
            )
        self._dtype = torch.float32 if first is None else first.a.dtype
        self._device = None if first is None else first.a.device
        for adapter in adapters:
            self.check(adapter)

    def check(self, adapter: Adapter) -> None:
        """Raises AdapterError where it does not fit. From any thread."""
        for path, (rank, inputs, outputs) in adapter.shapes.items():
            shape = self._shapes.get(path)
            if shape is None:
                raise _misfit(adapter, f"the model has no linear layer {path}")
            if shape != (inputs, outputs):
                raise _misfit(adapter, f"{path} is {shape[1]} x {shape[0]}, and the adapter's {outputs} x {inputs}")
            if path not in self._projections:
                raise _misfit(adapter, f"the model does not compute {path} as a layer of its own")
            if rank > self._rank:
                raise AdapterError(
                    f"adapter {adapter.name!r} has rank {rank}, and there is room for {self._rank}; set "
                    f"engine.adapters.max_rank to {rank} and start the worker again"
                )
        if not torch.tensor(adapter.largest).to(self._dtype).isfinite():
            raise _misfit(
                adapter,
                f"its weights, times lora_alpha, go up to {adapter.largest:.3g}, which is more than {self._dtype} "
                "holds; set engine.dtype to one that holds it",
            )

    def read(self, name: str, directory: str) -> tuple[Adapter, Pairs]:
        """One that fits, and its weights for `add`. From any thread. Raises AdapterError."""
        rows = sum(sum(self._shapes[path]) for path in self._projections)
        adapter, pairs = read_with_weights(name, directory, 8 * self._rank * rows + _HEADER_BYTES)
        self.check(adapter)
        return adapter, self._as_computed(pairs)

    def _as_computed(self, pairs: Pairs) -> Pairs:
        return {path: (a.to(self._dtype), b.to(self._dtype)) for path, (a, b) in pairs.items()}

    def keep_first(self) -> None:
        """Weights of those that it begins with, as far as there is room. Raises AdapterError."""
        for adapter in self._adapters.values():
            pairs = self._as_computed(read_again(adapter))
            if not self._kept.has_room(pairs):
                return
            self._kept.put(adapter.digest, pairs)

    # Between two steps.

    def add(self, adapter: Adapter, pairs: Pairs) -> None:
        self._adapters[adapter.digest] = adapter
        self._kept.put(adapter.digest, pairs)

    def drop(self, digest: str) -> None:
        """No sequence has it."""
        self._adapters.pop(digest, None)
        self._kept.drop(digest)
        self._holds = ["" if held == digest else held for held in self._holds]

    # Steps.

    def __str__(self) -> str:
        """For status."""
        return f"adapters: {len(self._adapters)} in {self._slots} slots"

    @property
    def held_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for p in self._projections.values() for t in (p.a, p.b))

    @contextlib.contextmanager
    def looking(self, rows: int) -> Iterator[None]:
        """Around one pass with so many rows. Raises AdapterError if it did not call every projection with them."""
        self._step.looking = True
        try:
            yield
        finally:
            self._step.looking = False
        for path, projection in list(self._projections.items()):
            if projection.seen == [rows]:
                continue
            adapter = next((a for a in self._adapters.values() if path in a.shapes), None)
            if adapter is not None:
                raise _misfit(adapter, f"the model does not compute {path} as a layer of its own")
            self._model.get_submodule(path).forward = projection.own
            del self._projections[path]

    @contextlib.contextmanager
    def during(self, runs: Sequence[Run]) -> Iterator[None]:
        """Rows of the pass within. Loads what no slot holds yet. Raises AdapterError."""
        for run in runs:
            if run[0] is not None and self._holds[run[0].slot] != run[0].digest:
                self._load(*run[0])
        self._step.spans = self._spans([(taken.slot, first, end) for taken, first, end in runs if taken is not None])
        try:
            yield
        finally:
            self._step.spans = []

    def _spans(self, runs: Sequence[tuple[int, int, int]]) -> list[tuple[int, torch.Tensor | None, int, int]]:
        spans: list[tuple[int, torch.Tensor | None, int, int]] = []
        short: list[tuple[int, int, int]] = []

        def together() -> None:
            if len(short) == 1:
                spans.append((short[0][0], None, *short[0][1:]))
            elif short:
                slots = [slot for slot, first, end in short for _ in range(first, end)]
                others = (torch.nn.functional.one_hot(torch.tensor(slots), self._slots) == 0).to(self._device)
                spans.append((-1, others[:, :, None], short[0][1], short[-1][2]))
            short.clear()

        for slot, first, end in runs:
            if end - first > _SHORT_ROWS:
                together()
                spans.append((slot, None, first, end))
                continue
            if short and short[-1][2] != first:
                together()
            short.append((slot, first, end))
        together()
        return spans

    def _load(self, slot: int, digest: str) -> None:
        began = time.perf_counter()
        self._holds[slot] = ""
        pairs = self._kept.take(digest)
        if pairs is None:
            pairs = self._as_computed(read_again(self._adapters[digest]))
            self._kept.put(digest, pairs)
        for path, projection in self._projections.items():
            for room in (projection.a[slot], projection.b[slot]):
                room.zero_()
            if path in pairs:
                a, b = pairs[path]
                projection.a[slot, : len(a)] = a.to(self._device, self._dtype)
                projection.b[slot, : len(a)] = b.T.to(self._device, self._dtype)
        self._holds[slot] = digest
        took_ms = (time.perf_counter() - began) * 1e3
        self.load_ms = took_ms if not self.load_ms else self.load_ms + _NEWEST * (took_ms - self.load_ms)


def adapting(adapters: AdapterLayers | None, items: Sequence[PlanItem]) -> contextlib.AbstractContextManager[None]:
    """Around a pass over the rows of `items`, in their order."""
    if adapters is None:
        return contextlib.nullcontext()
    return adapters.during(runs_of([(item.adapter, len(item.token_ids)) for item in items]))


def runs_of(owners: Sequence[tuple[InSlot | None, int]]) -> list[Run]:
    """Of items in the order of their rows, each with how many it has."""
    runs: list[Run] = []
    first = 0
    for taken, count in owners:
        if runs and runs[-1][0] == taken:
            runs[-1] = (taken, runs[-1][1], first + count)
        else:
            runs.append((taken, first, first + count))
        first += count
    return runs


def shapes_of(model: Any) -> Shapes:
    """Before kernels pack its weights."""
    found: dict[str, tuple[int, int]] = {}
    for path, layer in model.named_modules():
        if type(layer) is nn.Linear or isinstance(layer, MERGED):
            outputs, inputs = layer.weight.shape
            found[path] = inputs, getattr(layer, "own_rows", outputs)
    return found


def _misfit(adapter: Adapter, why: str) -> AdapterError:
    return AdapterError(f"adapter {adapter.name!r} does not fit the model: {why}; leave it out of engine.adapters")
