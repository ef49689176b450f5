"""Layers that keep a state instead of keys and values: linear attention, state spaces, short convolutions.

transformers' mixers know one sequence, or a batch of equal steps, and a cache that holds their states. The engine's
batch is packed. So each mixer of a model is put behind a `Mixer`, which runs the mixer's own code:

1. `take_over` finds the mixers: modules whose code stores states in a cache.
2. While the model is probed (engine/model_probe.py) each runs once with `Kept` in place of the cache, and says what it
   keeps. One after the other these tensors make a sequence's blob, in the type that the mixer made them:

       slot of the pool [bytes]   mixer 0: convolution | recurrent state   mixer 1: ...   each at a multiple of _ALIGNED

3. In a step all decodes run as one batch, and so do chunks of equal length, cut where a snapshot is taken
   (engine/recurrent_step.py). A mixer begins with what the chunk's source slot holds and leaves its end in the target
   slot (StateUse).
4. A mixer has two ways to compute: for several tokens, and for one that has a state. They must be one function, or what
   is computed again after a fault differs. Mamba 2 limits its time steps in the first way only: `_limit_time_steps`.
5. Some mixers do not look at a state that they get together with several tokens (Mamba 1). That is seen in the probe;
   chunks that continue then run token by token: exact, and slow.
6. On CPU most mixers run over the whole packed row at once: `Mixer.packed` (engine/native/recurrent.py).
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
from engine.mixer_cache import Kept, Key, States
from engine.recurrent_step import Rows, Step, Together

_ALIGNED = 64  # bytes
_CACHE_NAMES = ("cache_params", "past_key_values")
_STORES = frozenset({"update_conv_state", "update_recurrent_state", "set_linear_cache"})


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor [batch, *shape] of a mixer: elements [begin, end) of a slot that is looked at as `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int


class Mixer:
    """In place of a mixer's `forward`."""

    def __init__(self, shared: Recurrence, module: Any) -> None:
        self._shared = shared
        self.module = module
        self._inner: Callable[..., Any] = module.forward
        self._names = list(inspect.signature(self._inner).parameters)
        self.cache_name = next(name for name in _CACHE_NAMES if name in self._names)
        self.name = type(module).__name__
        self.layer: int = module.layer_idx
        self.fields: dict[Key, Field] = {}
        self.reads_state_in_chunks = True
        self.asked: dict[str, Any] = {}  # what it was called with in the probe
        self.packed: Callable[[Step, dict[str, Any]], Any] | None = None  # computes a whole step, in place of its code

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        given.pop(self.cache_name, None)
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
        if self.packed is not None:
            return self.packed(step, given)
        done: list[tuple[Rows, Any]] = []
        for group in step.together:
            kept = Kept(self.layer, self._load(step, group))
            answer = self._run(self._cut(given, group, tokens), group, kept)
            self._store(step, group, kept.states)
            done.append((group.rows, _in_a_row(answer, group)))
        return done[0][1] if len(done) == 1 and _is_all(done[0][0], tokens) else _joined(done, tokens)

    def _run(self, given: dict[str, Any], group: Together, kept: Kept) -> Any:
        if self.reads_state_in_chunks or not kept.states or group.tokens == 1:
            return self._inner(**given, **{self.cache_name: kept})
        done: list[tuple[Rows, Any]] = []
        for row in range(group.tokens):
            one = slice(row, row + 1)
            now = {name: _columns(value, one) for name, value in given.items()}
            done.append((one, self._inner(**now, **{self.cache_name: kept})))
        return _joined(done, group.tokens)

    def _load(self, step: Step, group: Together) -> States:
        """Copies: mixers may change a state in place."""
        if group.sources is None:
            return {}
        return {
            key: step.slots[f.dtype][:, f.begin : f.end].index_select(0, group.sources).view(group.count, *f.shape)
            for key, f in self.fields.items()
        }

    def _store(self, step: Step, group: Together, states: States) -> None:
        for key, f in self.fields.items():
            slots = step.slots[f.dtype][:, f.begin : f.end]
            ends = states[key].reshape(group.count, -1).to(f.dtype)
            slots.index_copy_(0, group.targets, ends)
            if group.snapshots is not None:
                which, where = group.snapshots
                slots.index_copy_(0, where, ends[which])

    def _cut(self, given: dict[str, Any], group: Together, tokens: int) -> dict[str, Any]:
        return {name: self._part(value, group, tokens) for name, value in given.items()}

    def _part(self, value: Any, group: Together, tokens: int) -> Any:
        """Of a tensor [1, tokens, ...]: [count, its tokens, ...]."""
        if isinstance(value, torch.Tensor):
            if value.dim() < 2 or value.shape[0] != 1 or value.shape[1] != tokens:
                raise AttentionRefused(f"{self.name} gets a tensor of shape {list(value.shape)}, not one of its tokens")
            return value[0, group.rows].reshape(group.count, group.tokens, *value.shape[2:])
        if isinstance(value, tuple | list):
            return type(value)(self._part(v, group, tokens) for v in value)
        return value

    # While the model is probed.

    def _look(self, given: dict[str, Any], tokens: int) -> Any:
        kept = Kept(self.layer)
        answer = self._inner(**given, **{self.cache_name: kept})
        nowhere = torch.empty(0)
        self._cut(given, Together(slice(0, 1), 1, 1, None, nowhere, None), tokens)  # raises for what cannot be cut
        if not self.fields:
            self.fields = self._shared.room_for(self, kept.states)
        self.asked = given
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
            answer = self._inner(**given, **{self.cache_name: kept})
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
        self.step: Step | None = None
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
        self.step = Step(pool, chunks, {field.dtype for mixer in self.mixers for field in mixer.fields.values()})
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


def _columns(value: Any, rows: slice) -> Any:
    """Of all tensors [n, tokens, ...]."""
    if isinstance(value, torch.Tensor):
        return value[:, rows]
    return type(value)(_columns(v, rows) for v in value) if isinstance(value, tuple | list) else value


def _in_a_row(value: Any, group: Together) -> Any:
    """[count, tokens, ...] to [1, count * tokens, ...]; None for what is not of tokens."""
    if isinstance(value, tuple | list):
        return type(value)(_in_a_row(v, group) for v in value)
    if not isinstance(value, torch.Tensor) or value.shape[:2] != (group.count, group.tokens):
        return None
    return value.reshape(1, -1, *value.shape[2:])


def _joined(done: Sequence[tuple[Rows, Any]], tokens: int) -> Any:
    """Answers [1, n, ...] at their rows of the whole, zeros where it is padded; None for what is not of tokens."""
    first = done[0][1]
    if isinstance(first, tuple | list):
        return type(first)(_joined([(rows, answer[i]) for rows, answer in done], tokens) for i in range(len(first)))
    if not all(isinstance(answer, torch.Tensor) and answer.shape[1:2] == (_count(rows),) for rows, answer in done):
        return None
    whole = first.new_zeros(first.shape[0], tokens, *first.shape[2:])
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
