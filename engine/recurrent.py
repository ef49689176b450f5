"""Layers that keep a state instead of keys and values: linear attention, state spaces, short convolutions.

transformers' mixers know one sequence, or a batch of equal steps, and a cache that holds their states. The engine's
batch is packed. So each mixer of a model is put behind a `Mixer`, which runs the mixer's own code:

1. `take_over` finds the mixers: modules whose code stores states in a cache.
2. While the model is probed (engine/model_probe.py) each runs once with `Kept` in place of the cache, and says what it
   keeps. One after the other these tensors make a sequence's blob, in the type that the mixer made them:

       slot of the pool [bytes]   mixer 0: convolution | recurrent state   mixer 1: ...   each at a multiple of _ALIGNED

3. In a step all decodes run as one batch, and each chunk of a prompt by itself, cut where its snapshot is taken. A
   mixer begins with what the chunk's source slot holds and leaves its end in the target slot (StateUse).
4. A mixer has two ways to compute: for several tokens, and for one that has a state. They must be one function, or what
   is computed again after a fault differs. Mamba 2 limits its time steps in the first way only: `_limit_time_steps`.
5. Some mixers do not look at a state that they get together with several tokens (Mamba 1). That is seen in the probe;
   chunks that continue then run token by token: exact, and slow.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from engine.attention.interface import AttentionRefused, Chunk, MaskSeen

_ALIGNED = 64  # bytes
_CACHE_NAMES = ("cache_params", "past_key_values")
_STORES = frozenset({"update_conv_state", "update_recurrent_state", "set_linear_cache"})

Key = tuple[str, int]  # what kind of state, and its number among those of the layer
States = dict[Key, torch.Tensor]
Rows = slice | torch.Tensor  # of the packed row


class Kept:
    """What one mixer looks at in place of transformers' cache: its states of one sequence, or of a batch."""

    def __init__(self, layer: int, states: States | None = None) -> None:
        self._layer = layer
        self.states: States = states or {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._get("convolution", layer_idx, state_idx)

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Keeps the last `conv_kernel_size` columns, and returns those before and the new ones."""
        before = self._get("convolution", layer_idx, state_idx)
        if before is not None:
            size = before.shape[-1]
            columns = torch.cat((before, conv_states), dim=-1)
        else:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            columns = torch.nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        self._put("convolution", layer_idx, state_idx, columns[..., -size:])
        return columns

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._get("recurrent", layer_idx, state_idx)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        return self._put("recurrent", layer_idx, state_idx, recurrent_states)

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        return self._get("linear", layer_idx, 0)

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        self._put("linear", layer_idx, 0, linear_cache)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.states)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def _get(self, kind: str, layer: int, number: int) -> torch.Tensor | None:
        self._check(layer)
        return self.states.get((kind, number))

    def _put(self, kind: str, layer: int, number: int, state: torch.Tensor) -> torch.Tensor:
        """In the type that it had at first, as in transformers' cache."""
        self._check(layer)
        before = self.states.get((kind, number))
        self.states[kind, number] = state if before is None else state.to(before.dtype)
        return self.states[kind, number]

    def _check(self, layer: int) -> None:
        if layer != self._layer:
            raise AttentionRefused(f"the mixer of layer {self._layer} looks at the state of layer {layer}")


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor [batch, *shape] of a mixer: elements [begin, end) of a slot that is looked at as `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens of one prompt that run in one go: they begin with what slot `source` holds; -1: nothing; None: with what
    the piece before left. Their end goes to the slots `ends`.
    """

    rows: slice
    source: int | None
    ends: tuple[int, ...]


class _Step:
    """How the packed row falls into calls of a mixer. `slots`: the pool, by the type that it is looked at as."""

    def __init__(self, pool: torch.Tensor, chunks: Sequence[Chunk], dtypes: set[torch.dtype]) -> None:
        self.slots = {dtype: pool.view(dtype) for dtype in dtypes}
        self.pieces: list[_Piece] = []
        decodes: list[Chunk] = []
        for chunk in chunks:
            use = chunk.state
            assert use is not None, "a chunk without slots for its state"
            if chunk.num_tokens == 1 and use.source >= 0:
                decodes.append(chunk)
                continue
            first, end = chunk.first_row, chunk.first_row + chunk.num_tokens
            if 0 < use.snapshot_after < chunk.num_tokens:
                middle = first + use.snapshot_after
                self.pieces.append(_Piece(slice(first, middle), use.source, (use.snapshot,)))
                self.pieces.append(_Piece(slice(middle, end), None, (use.target,)))
            else:
                ends = (use.target, use.snapshot) if use.snapshot_after else (use.target,)
                self.pieces.append(_Piece(slice(first, end), use.source, ends))
        self.num_decodes = len(decodes)
        if not decodes:
            return
        uses = [(chunk.state.source, chunk.state.target) for chunk in decodes if chunk.state is not None]
        first = decodes[0].first_row
        rows = [chunk.first_row for chunk in decodes]
        taken = [(i, c.state.snapshot) for i, c in enumerate(decodes) if c.state is not None and c.state.snapshot_after]
        together = rows == list(range(first, first + len(rows)))
        numbers = torch.tensor([*rows, *(s for s, _ in uses), *(t for _, t in uses), *sum(taken, ())])
        numbers = numbers.to(pool.device, non_blocking=True)
        self.decodes: Rows = slice(first, first + len(rows)) if together else numbers[: len(rows)]
        _, self.sources, self.targets, snapshots = numbers.split([len(rows)] * 3 + [2 * len(taken)])
        self.snapshots = snapshots.view(-1, 2).unbind(1) if taken else None  # which decodes, and to which slots


class Mixer:
    """In place of a mixer's `forward`."""

    def __init__(self, shared: Recurrence, module: Any) -> None:
        self._shared = shared
        self._inner: Callable[..., Any] = module.forward
        self._names = list(inspect.signature(self._inner).parameters)
        self._cache_name = next(name for name in _CACHE_NAMES if name in self._names)
        self.name = type(module).__name__
        self.layer: int = module.layer_idx
        self.fields: dict[Key, Field] = {}
        self.reads_state_in_chunks = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        given.pop("diptych_step", None)
        given.pop(self._cache_name, None)
        tokens = next(value for value in given.values() if isinstance(value, torch.Tensor)).shape[1]
        for name, value in given.items():
            if isinstance(value, MaskSeen):
                given[name] = None
            elif "mask" in name and isinstance(value, torch.Tensor):
                raise AttentionRefused(f"{self.name} gets an attention mask")
        if self._shared.looking:
            return self._look(given, tokens)
        step = self._shared.step
        assert step is not None, "a mixer outside of a step"
        if step.num_decodes == tokens:  # nothing else, in this order
            return _turned(self._decode(step, given, tokens))
        done: list[tuple[Rows, Any]] = []
        if step.num_decodes:
            done.append((step.decodes, _turned(self._decode(step, given, tokens))))
        states: States = {}
        for piece in step.pieces:
            if piece.source is not None:
                states = self._load(step, piece.source) if piece.source >= 0 else {}
            kept = Kept(self.layer, states)
            done.append((piece.rows, self._run(self._cut(given, piece.rows, tokens), kept)))
            states = kept.states
            for slot in piece.ends:
                self._store(step, slot, states)
        return done[0][1] if len(done) == 1 and _is_all(done[0][0], tokens) else _joined(done, tokens)

    def _run(self, given: dict[str, Any], kept: Kept) -> Any:
        """The tokens of one sequence."""
        tokens = next(value for value in given.values() if isinstance(value, torch.Tensor)).shape[1]
        if self.reads_state_in_chunks or not kept.states or tokens == 1:
            return self._inner(**given, **{self._cache_name: kept})
        done: list[tuple[Rows, Any]] = []
        for row in range(tokens):
            one = slice(row, row + 1)
            done.append((one, self._inner(**self._cut(given, one, tokens), **{self._cache_name: kept})))
        return _joined(done, tokens)

    def _decode(self, step: _Step, given: dict[str, Any], tokens: int) -> Any:
        """One token of each sequence: [batch, 1, ...]."""
        count = step.num_decodes
        states = {
            key: step.slots[f.dtype][:, f.begin : f.end].index_select(0, step.sources).view(count, *f.shape)
            for key, f in self.fields.items()
        }
        kept = Kept(self.layer, states)
        answer = self._inner(**_turned(self._cut(given, step.decodes, tokens)), **{self._cache_name: kept})
        for key, f in self.fields.items():
            slots = step.slots[f.dtype][:, f.begin : f.end]
            ends = kept.states[key].reshape(count, -1).to(f.dtype)
            slots.index_copy_(0, step.targets, ends)
            if step.snapshots is not None:
                which, where = step.snapshots
                slots.index_copy_(0, where, ends[which])
        return answer

    def _load(self, step: _Step, slot: int) -> States:
        """Copies: mixers may change a state in place."""
        return {
            key: step.slots[f.dtype][slot, f.begin : f.end].clone().view(1, *f.shape) for key, f in self.fields.items()
        }

    def _store(self, step: _Step, slot: int, states: States) -> None:
        for key, f in self.fields.items():
            step.slots[f.dtype][slot, f.begin : f.end].view(1, *f.shape).copy_(states[key])

    def _cut(self, given: dict[str, Any], rows: Rows, tokens: int) -> dict[str, Any]:
        if _is_all(rows, tokens):
            return dict(given)
        return {name: self._part(value, rows, tokens) for name, value in given.items()}

    def _part(self, value: Any, rows: Rows, tokens: int) -> Any:
        """Of a tensor [1, tokens, ...]."""
        if isinstance(value, torch.Tensor):
            if value.dim() < 2 or value.shape[0] != 1 or value.shape[1] != tokens:
                raise AttentionRefused(f"{self.name} gets a tensor of shape {list(value.shape)}, not one of its tokens")
            return value[0, rows][None]
        if isinstance(value, tuple | list):
            return type(value)(self._part(v, rows, tokens) for v in value)
        return value

    # While the model is probed.

    def _look(self, given: dict[str, Any], tokens: int) -> Any:
        kept = Kept(self.layer)
        whole = slice(0, tokens)
        answer = self._inner(**self._cut(given, whole, tokens), **{self._cache_name: kept})
        self._cut(given, slice(0, 1), tokens)  # raises for what cannot be cut
        if not self.fields:
            self.fields = self._shared.room_for(self, kept.states)
        if not isinstance(answer, FakeTensor) and not any(isinstance(s, FakeTensor) for s in kept.states.values()):
            self.reads_state_in_chunks = self._looks_at(given, kept.states)
        return answer

    def _looks_at(self, given: dict[str, Any], states: States) -> bool:
        """Whether each state matters to several tokens at once. Those of the probe may be zeros: these are not."""
        name, tokens = next((n, v) for n, v in given.items() if isinstance(v, torch.Tensor))
        given = given | {
            name: torch.arange(tokens.numel(), device=tokens.device).sin().to(tokens.dtype).view_as(tokens)
        }

        def computed(before: States) -> list[torch.Tensor]:
            kept = Kept(self.layer, {key: state.clone() for key, state in before.items()})
            answer = self._inner(**given, **{self._cache_name: kept})
            return [value for value in _flat(answer) if isinstance(value, torch.Tensor)]

        plain = {key: torch.ones_like(state) for key, state in states.items()}
        usual = computed(plain)
        for key in states:
            other = computed(plain | {key: plain[key] * 3})
            if all(torch.equal(a, b) for a, b in zip(usual, other, strict=True)):
                return False
        return True


class Recurrence:
    """What all mixers of a model share: the blob's layout, and the step that is being computed."""

    def __init__(self) -> None:
        self.mixers: list[Mixer] = []
        self.looking = False
        self.step: _Step | None = None
        self.width = 0  # bytes of a sequence's blob

    @property
    def layers(self) -> set[int]:
        """Of which something is kept."""
        return {mixer.layer for mixer in self.mixers if mixer.fields}

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        self.looking = True
        try:
            yield
        finally:
            self.looking = False

    @contextlib.contextmanager
    def during(self, pools: Sequence[torch.Tensor], chunks: Sequence[Chunk]) -> Iterator[None]:
        """`pools`: of all groups; the one of states is [slots, width] of bytes."""
        pool = next(pool for pool in pools if pool.dtype == torch.uint8 and pool.shape[1:] == (self.width,))
        self.step = _Step(pool, chunks, {field.dtype for mixer in self.mixers for field in mixer.fields.values()})
        try:
            yield
        finally:
            self.step = None

    def room_for(self, mixer: Mixer, states: States) -> dict[Key, Field]:
        if not states:
            raise AttentionRefused(f"{mixer.name} keeps nothing in its cache")
        fields = {}
        for key, state in states.items():
            if any(key in other.fields for other in self.mixers if other.layer == mixer.layer):
                raise AttentionRefused(f"two mixers of layer {mixer.layer} keep the same state")
            begin = self.width // state.dtype.itemsize
            elements = math.prod(state.shape[1:])
            fields[key] = Field(tuple(state.shape[1:]), state.dtype, begin, begin + elements)
            self.width += -(-elements * state.dtype.itemsize // _ALIGNED) * _ALIGNED
        return fields


def take_over(model: Any) -> Recurrence | None:
    """Puts each mixer of a model behind a `Mixer`, once; None if it has none. Raises AttentionRefused."""
    found = recurrence_of(model)
    if found is not None:
        return found
    modules = [module for module in model.modules() if _keeps_states(module)]
    if not modules:
        return None
    shared = Recurrence()
    for module in modules:
        if not isinstance(getattr(module, "layer_idx", None), int):
            raise AttentionRefused(f"{type(module).__name__} does not say which layer it belongs to")
        shared.mixers.append(Mixer(shared, module))
        module.forward = shared.mixers[-1].forward
        _limit_time_steps(module)
    model.diptych_recurrence = shared
    return shared


def _limit_time_steps(module: Any) -> None:
    """softplus(projected + bias) is what the mixer limits, in one of its ways; projected itself is limited here."""
    low, high = getattr(module, "time_step_limit", None) or (0.0, math.inf)
    if low <= 0 and high == math.inf:
        return
    heads = module.num_heads

    def before_softplus(step: float) -> float:
        return step + math.log(-math.expm1(-step)) if step > 0 else -math.inf

    def limit(_: Any, __: Any, projected: torch.Tensor) -> torch.Tensor:
        steps, bias = projected[..., -heads:], module.dt_bias
        steps.copy_(steps.clamp(before_softplus(low) - bias, before_softplus(high) - bias))
        return projected

    module.in_proj.register_forward_hook(limit)


def recurrence_of(model: Any) -> Recurrence | None:
    return getattr(model, "diptych_recurrence", None)


def _keeps_states(module: Any) -> bool:
    """Its class stores states in a cache that it is given."""
    functions = [f for c in type(module).__mro__ for f in vars(c).values() if inspect.isfunction(f)]
    if not any(_STORES & set(_names_in(inspect.unwrap(function).__code__)) for function in functions):
        return False
    return bool(set(_CACHE_NAMES) & set(inspect.signature(module.forward).parameters))


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_in(inner)


def _is_all(rows: Rows, tokens: int) -> bool:
    return isinstance(rows, slice) and rows.start == 0 and rows.stop == tokens


def _turned(value: Any) -> Any:
    """[1, n, ...] to [n, 1, ...] and back, of all tensors; not by transpose, whose strides make products slow."""
    if isinstance(value, torch.Tensor):
        if value.dim() < 2:
            return value
        return value.squeeze(0).unsqueeze(1) if value.shape[0] == 1 else value.squeeze(1).unsqueeze(0)
    if isinstance(value, dict):
        return {name: _turned(v) for name, v in value.items()}
    return type(value)(map(_turned, value)) if isinstance(value, tuple | list) else value


def _joined(done: Sequence[tuple[Rows, Any]], tokens: int) -> Any:
    """Answers [1, n, ...] at their rows of the packed one, zeros where it is padded; None for what is not of tokens."""
    first = done[0][1]
    if isinstance(first, tuple | list):
        return type(first)(_joined([(rows, answer[i]) for rows, answer in done], tokens) for i in range(len(first)))
    if not all(isinstance(answer, torch.Tensor) and answer.shape[1:2] == (_count(rows),) for rows, answer in done):
        return None
    whole = first.new_zeros(1, tokens, *first.shape[2:])
    for rows, answer in done:
        whole[:, rows] = answer
    return whole


def _count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for v in value:
            yield from _flat(v)
    else:
        yield value
