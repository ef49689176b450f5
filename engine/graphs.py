"""Decode steps replayed as CUDA graphs: one launch instead of a thousand. Not yet run on a GPU.

1. A step of decodes alone, of at most the largest batch bucket, goes through a graph; every other step runs eagerly.
2. A graph has a shape: sequences, rounded up to a bucket, and splits of the longest context, rounded up likewise.
   It reads its inputs from buffers of that shape (engine/attention/triton_paged.py: StaticDecodes). Rows beyond the
   batch are padding: their keys are written nowhere and nobody reads their logits.
3. Steps run eagerly until their shape is recorded. That is done when the worker has nothing to do (`improve`), shapes
   that were met before those that may come; or, where it always has, at the `_IMPATIENT`th meeting. A recording works
   on padding alone, so it writes no keys.
4. A recorded shape is tried at its first use: the replayed logits are compared with the eager ones. A recording that
   fails or differs turns graphs off for good, with a warning; the step itself is answered eagerly.
5. A batch with one long context among many short ones would launch mostly idle programs: it runs eagerly.

What is recorded and replayed is a `Recorder`'s business: CUDA's in service; tests replay by running again.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from engine.attention.interface import Chunk, StepBatch
from engine.forward import Arriving, TorchForward
from engine.kv_shape import KvPool

log = logging.getLogger(__name__)

BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_SPLITS = (4, 16, 64, 256, 1024)
_MAX_GRAPHS = 40
_IMPATIENT = 64
_MAX_IDLE_SHARE = 0.75  # of the programs that a graph launches for attention
# Between a replay and the same kernels launched one by one there should be no difference at all; products may choose
# another algorithm for a padded batch.
_TRIAL_LIMIT = 5e-2  # of the logits' deviation, for the median row


class StaticBatch(StepBatch, Protocol):
    def fill(self, chunks: Sequence[Chunk]) -> None:
        """The next step's sequences, at most as many as the batch was made for."""
        ...


class StaticBackend(Protocol):
    """An attention backend whose launches depend on a shape alone."""

    def static(self, kv: torch.Tensor, batch: int, splits: int, table_blocks: int) -> StaticBatch: ...

    def splits(self, chunk: Chunk) -> int: ...


class Recorder(Protocol):
    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Runs `work` at least once; returns what repeats it on the same buffers."""
        ...


class CudaRecorder:
    """All graphs share one pool of memory: no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        # Lazily made workspaces and compiled kernels must exist before a recording, and a side stream must make them.
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        self._pool = self._pool or graph.pool()
        return graph.replay


class _Graph:
    """One shape's buffers and its replay."""

    def __init__(self, forward: TorchForward, static: StaticBatch, batch: int, kv: torch.Tensor) -> None:
        self._static = static
        self._inputs = torch.zeros((2, 1, batch), dtype=torch.int64, device=kv.device)
        self._keep = torch.arange(batch, device=kv.device)
        self._forward = forward
        self.logits: torch.Tensor | None = None
        self.proven = False
        self.replay: Callable[[], None] = lambda: None

    def fill(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        chunks: Sequence[Chunk],
        arriving: Arriving | None,
    ) -> None:
        count = len(token_ids)
        self._inputs[:, 0, :count].copy_(_staged([token_ids, positions], self._inputs), non_blocking=True)
        self._inputs[:, 0, count:].zero_()
        if arriving is not None:
            places = _staged([arriving.rows, arriving.sources], self._inputs).to(self._inputs.device, non_blocking=True)
            self._inputs[0, 0, places[0]] = arriving.tokens[places[1]]
        self._static.fill(chunks)

    def work(self) -> None:
        logits = self._forward.logits(self._inputs[0], self._inputs[1], self._static, self._keep)
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)


def _staged(values: Sequence[Sequence[int]], like: torch.Tensor) -> torch.Tensor:
    staged = torch.tensor(values, dtype=torch.int64)
    return staged.pin_memory() if like.is_cuda else staged


class GraphForward:
    """A Forward. `context_blocks`: blocks of the longest context that may come. `expect`: shapes of short contexts are
    recorded before they are met.
    """

    def __init__(
        self, inner: TorchForward, recorder: Recorder, context_blocks: int, max_batch: int, *, expect: bool = True
    ) -> None:
        backend: Any = inner.backend
        self._inner = inner
        self._backend: StaticBackend = backend
        self._recorder = recorder
        self._context_blocks = context_blocks
        self._batches = [b for b in BATCHES if b < max_batch] + [min(max_batch, BATCHES[-1])]
        self._graphs: OrderedDict[tuple[int, int], _Graph] = OrderedDict()
        self._met: Counter[tuple[int, int]] = Counter()  # shapes without a graph, and how often they came
        if expect:
            self._met.update({(batch, _SPLITS[0]): 0 for batch in self._batches})
        self._on = True

    @property
    def name(self) -> str:
        return f"{self._inner.name}, {'CUDA graphs' if self._on else 'CUDA graphs given up'}"

    @property
    def backend(self) -> Any:
        return self._inner.backend

    @backend.setter
    def backend(self, backend: Any) -> None:
        """For checks that run one model over several. One that cannot be recorded runs eagerly."""
        self._inner.backend = self._backend = backend
        self._graphs.clear()
        self._on = hasattr(backend, "static")

    def forward(
        self,
        kv: KvPool,
        token_ids: Sequence[int],
        positions: Sequence[int],
        chunks: list[Chunk],
        keep: Sequence[int],
        arriving: Arriving | None = None,
    ) -> torch.Tensor:
        assert isinstance(kv, torch.Tensor), "only plain pools are recorded"
        shape = self._shape(chunks, keep) if self._on else None
        if shape is None:
            return self._inner.forward(kv, token_ids, positions, chunks, keep, arriving)
        graph = self._graphs.get(shape)
        if graph is None:
            self._met[shape] += 1
            graph = self._record(shape, kv) if self._met[shape] >= _IMPATIENT else None
        if graph is None:
            return self._inner.forward(kv, token_ids, positions, chunks, keep, arriving)
        self._graphs.move_to_end(shape)
        if not graph.proven:
            return self._try(graph, kv, token_ids, positions, chunks, keep, arriving)
        graph.fill(token_ids, positions, chunks, arriving)
        graph.replay()
        assert graph.logits is not None
        return graph.logits[: len(keep)]

    def improve(self, kv: torch.Tensor) -> bool:
        """Records a shape, the one that was met most often. False: there is nothing left to record."""
        if not self._on or not self._met or len(self._graphs) >= _MAX_GRAPHS:
            return False
        self._record(max(self._met, key=lambda shape: (self._met[shape], -shape[0])), kv)
        return True

    def _shape(self, chunks: Sequence[Chunk], keep: Sequence[int]) -> tuple[int, int] | None:
        """None: not for a graph."""
        if len(chunks) > self._batches[-1] or len(keep) != len(chunks):
            return None
        # A replay gives a row of logits for each sequence, in their order.
        if any(c.num_tokens != 1 or c.start == 0 or c.first_row != row for c, row in zip(chunks, keep, strict=True)):
            return None
        splits = [self._backend.splits(c) for c in chunks]
        batch = next(b for b in self._batches if b >= len(chunks))
        longest = next((s for s in _SPLITS if s >= max(splits)), None)
        if longest is None or (longest > _SPLITS[0] and sum(splits) < (1 - _MAX_IDLE_SHARE) * batch * longest):
            return None
        return batch, longest

    def _record(self, shape: tuple[int, int], kv: torch.Tensor) -> _Graph | None:
        batch, splits = shape
        del self._met[shape]
        try:
            graph = _Graph(self._inner, self._backend.static(kv, batch, splits, self._context_blocks), batch, kv)
            graph.fill([], [], [], None)
            graph.replay = self._recorder.record(graph.work)
        except Exception as error:  # a model that asks the device in mid-step, memory, a driver: any kind
            self._give_up(f"recording {batch} sequences failed: {type(error).__name__}: {str(error).strip()[:300]}")
            return None
        self._graphs[shape] = graph
        if len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph

    def _try(
        self,
        graph: _Graph,
        kv: torch.Tensor,
        token_ids: Sequence[int],
        positions: Sequence[int],
        chunks: list[Chunk],
        keep: Sequence[int],
        arriving: Arriving | None,
    ) -> torch.Tensor:
        eager = self._inner.forward(kv, token_ids, positions, chunks, keep, arriving)
        graph.fill(token_ids, positions, chunks, arriving)
        graph.replay()
        assert graph.logits is not None
        found = graph.logits[: len(keep)]
        off = ((found.float() - eager.float()).square().mean(-1).sqrt().median() / eager.float().std()).item()
        graph.proven = off <= _TRIAL_LIMIT  # a NaN is no agreement
        if not graph.proven:
            self._give_up(f"the replay's logits differ from the eager ones by {off:.2g} of their deviation")
        return eager

    def _give_up(self, why: str) -> None:
        log.warning("decode steps run without CUDA graphs, which is slower: %s", why)
        self._on = False
        self._graphs.clear()
