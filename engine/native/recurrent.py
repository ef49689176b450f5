"""Recurrent layers on the native kernels (recurrent.h): a mixer's own code runs once, over the whole packed row.

1. Of a mixer's code only few functions know that tokens follow each other: its convolution, and its recurrence. A copy
   of that code is made in which they are ours. They get the packed row, and know where in it sequences begin and in
   which slots their states are; all else is done token by token anyway.
2. A state is read from one slot and written to another, by the token that ends there: nothing is copied before.
3. Each mixer is held against itself first, with numbers, over chunks, continued chunks, snapshots and single tokens.
   One that differs, or that cannot, keeps its own way (engine/recurrent.py).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.nn.functional import silu, softplus

from engine.attention.interface import Chunk, StateUse
from engine.native.library import (
    DTYPES,
    CConvolution,
    CDeltaRule,
    CRecurrent,
    CSelectiveScan,
    CStates,
    CStateSpace,
    Library,
)
from engine.recurrent import Field, Mixer, Recurrence
from engine.recurrent_step import Step

log = logging.getLogger(__name__)

_LANES, _TAPS, _KEYS, _STATE_SPACE, _SELECTIVE = 16, 8, 256, 256, 64  # recurrent.h
_SILU = ("silu", "swish")
_ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 1e-1}  # of the root mean square of rows


class CannotPackError(Exception):
    """The kernels do not compute what a mixer asks for."""


def pack_mixers(recurrence: Recurrence, library: Library) -> int:
    """How many mixers run so from now on."""
    for mixer in recurrence.mixers:
        found = _packed(mixer, library)
        if isinstance(found, str):
            log.info("%s of layer %d keeps its own way: %s", mixer.name, mixer.layer, found)
            continue
        mixer.packed = found
        if off := _disagreement(recurrence, mixer):
            mixer.packed = None
            log.warning("%s of layer %d keeps its own way: native kernels %s", mixer.name, mixer.layer, off)
    return sum(mixer.packed is not None for mixer in recurrence.mixers)


def _packed(mixer: Mixer, library: Library) -> Packed | str:
    own = inspect.unwrap(type(mixer.module).forward)
    found = {name: FUNCTIONS[name] for name in FUNCTIONS if name in own.__code__.co_names}
    if not found or sorted(kind for kind, _ in found.values()) != sorted(kind for kind, _ in mixer.fields):
        return "what of its code knows of sequences is not known"
    for (kind, _), field in mixer.fields.items():
        if field.dtype not in DTYPES or (kind == "recurrent" and field.dtype != torch.float32):
            return f"its {kind} state is {field.dtype}"
    return Packed(library, mixer, own, {name: function for name, (_, function) in found.items()})


class Packed:
    """Stands in for a mixer's cache, and for the functions of its code that know of sequences."""

    def __init__(
        self, library: Library, mixer: Mixer, own: Callable[..., Any], ours: dict[str, Callable[..., Any]]
    ) -> None:
        self._library, self._module, self._cache_name = library, mixer.module, mixer.cache_name
        bound = {name: of.__get__(self) for name, of in ours.items()}
        copied = FunctionType(own.__code__, own.__globals__ | bound, own.__name__, own.__defaults__, own.__closure__)
        copied.__kwdefaults__ = own.__kwdefaults__
        self._code = copied
        self._fields = {kind: field for (kind, _), field in mixer.fields.items()}
        self._constants: dict[str, torch.Tensor] = {}  # parameters as kernels read them
        self._c: dict[type, Any] = {}
        self._step: Step | None = None

    def __call__(self, step: Step, given: dict[str, Any]) -> Any:
        self._step = step
        try:
            return self._code(self._module, **given, **{self._cache_name: self})
        finally:
            self._step = None

    # As a cache: nothing is seen to be kept.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, **_: Any) -> torch.Tensor:
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int, **_: Any) -> torch.Tensor:
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    # As functions of transformers' modules. Tensors have one sequence, the packed row.

    def convolution(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """hidden_states [1, channels, T]"""
        field = self._fields["convolution"]
        x = _tokens(hidden_states.transpose(1, 2))
        channels, taps = weight.shape
        columns = field.shape[-1]
        _demand(channels % _LANES == 0 and taps <= _TAPS and taps - 1 <= columns <= _TAPS and x.dtype == field.dtype)
        out = torch.empty(x.shape, dtype=x.dtype)
        c = self._structure(CConvolution)
        c.channels, c.taps, c.columns, c.silu = channels, taps, columns, activation in _SILU
        c.weight = self._floats("weight", weight.t())
        c.bias = None if bias is None else self._floats("bias", bias)
        c.x, c.x_step, c.out = x.data_ptr(), x.stride(1), out.data_ptr()
        self._run(c, field, x.dtype)
        if activation is not None and activation not in _SILU:
            from transformers.activations import ACT2FN

            out = ACT2FN[activation](out)
        return out.transpose(1, 2)

    def state_space(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        chunk_size: int,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **_: Any,
    ) -> Any:
        """hidden_states [1, T, heads, width], dt [1, T, heads], B and C [1, T, groups, size]"""
        tokens, heads, width = hidden_states.shape[1:]
        groups, size = B.shape[2:]
        x, b, c_, dt = (_tokens(t) for t in (hidden_states, B, C, dt))
        _demand(size % _LANES == 0 and size <= _STATE_SPACE and x.dtype == b.dtype == c_.dtype == dt.dtype)
        out = torch.empty((1, tokens, heads, width), dtype=torch.float32)
        a = A.float().contiguous()
        c = self._structure(CStateSpace)
        c.heads, c.groups, c.width, c.size, c.softplus = heads, groups, width, size, dt_softplus
        c.least, c.most = dt_limit
        c.x, c.b, c.c, c.dt = x.data_ptr(), b.data_ptr(), c_.data_ptr(), dt.data_ptr()
        c.x_step, c.b_step, c.c_step, c.dt_step = x.stride(1), b.stride(1), c_.stride(1), dt.stride(1)
        c.a, c.out = a.data_ptr(), out.data_ptr()
        c.d = None if D is None else self._floats("d", D)
        c.dt_bias = None if dt_bias is None else self._floats("dt_bias", dt_bias)
        self._run(c, self._fields["recurrent"], x.dtype)
        return (out, out) if return_final_states else out

    def delta_rule(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query, key [1, T, key heads, keys], value [1, T, heads, values], g [1, T, heads] or [1, T, heads, keys]"""
        heads, values = value.shape[2:]
        key_heads, keys = key.shape[2:]
        q, k, v = (_tokens(t) for t in (query, key, value))
        _demand(keys % _LANES == 0 and values % _LANES == 0 and keys <= _KEYS and q.dtype == k.dtype == v.dtype)
        decay, beta = g.float().contiguous(), beta.float().contiguous()
        out = torch.empty(value.shape, dtype=q.dtype)
        c = self._structure(CDeltaRule)
        c.heads, c.key_heads, c.keys, c.values = heads, key_heads, keys, values
        c.decays = 1 if g.dim() == 3 else keys
        c.normalize, c.scale = use_qk_l2norm_in_kernel, keys**-0.5
        c.q, c.k, c.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        c.q_step, c.k_step, c.v_step = q.stride(1), k.stride(1), v.stride(1)
        c.decay, c.beta, c.out = decay.data_ptr(), beta.data_ptr(), out.data_ptr()
        self._run(c, self._fields["recurrent"], q.dtype)
        return out, out

    def selective_scan(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **_: Any,
    ) -> Any:
        """hidden_states, dt, z [1, channels, T], A [channels, size], B and C [1, size, T]"""
        channels, size = A.shape
        x, b, c_ = (_tokens(t.transpose(1, 2)) for t in (hidden_states, B, C))
        _demand(size % _LANES == 0 and size <= _SELECTIVE and x.dtype == b.dtype == c_.dtype)
        steps = dt.transpose(1, 2).float()
        if delta_bias is not None:
            steps = steps + delta_bias.float()
        steps = (softplus(steps) if delta_softplus else steps).contiguous()
        out = torch.empty(steps.shape, dtype=torch.float32)
        a = A.float().contiguous()
        c = self._structure(CSelectiveScan)
        c.channels, c.size = channels, size
        c.x, c.b, c.c = x.data_ptr(), b.data_ptr(), c_.data_ptr()
        c.x_step, c.b_step, c.c_step = x.stride(1), b.stride(1), c_.stride(1)
        c.dt, c.a, c.out = steps.data_ptr(), a.data_ptr(), out.data_ptr()
        c.d = None if D is None else self._floats("d", D)
        self._run(c, self._fields["recurrent"], x.dtype)
        if z is not None:
            out = out * silu(z.transpose(1, 2).float())
        out = out.transpose(1, 2)
        return (out, out) if return_last_state else out

    def _run(self, layer: CRecurrent, field: Field, dtype: torch.dtype) -> None:
        step = self._step
        assert step is not None
        c = self._structure(CStates)
        runs, pool = step.runs, step.pool
        c.runs, c.num_runs = runs.ctypes.data, len(runs)
        c.pool, c.slot_bytes, c.offset = pool.data_ptr(), pool.stride(0), field.begin * field.dtype.itemsize
        self._library.recurrent(dtype == torch.bfloat16, c, layer)

    def _structure(self, kind: type) -> Any:
        if kind not in self._c:
            self._c[kind] = kind()
        return self._c[kind]

    def _floats(self, name: str, parameter: torch.Tensor) -> int:
        if name not in self._constants:
            self._constants[name] = parameter.detach().float().contiguous().clone()
        return self._constants[name].data_ptr()


# In transformers' code: the kind of state that the function keeps, and ours.
FUNCTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "causal_conv1d_fn": ("convolution", Packed.convolution),
    "mamba2_chunk_scan": ("recurrent", Packed.state_space),
    "torch_chunk_gated_delta_rule": ("recurrent", Packed.delta_rule),
    "chunk_kimi_delta_attention": ("recurrent", Packed.delta_rule),
    "mamba_selective_scan": ("recurrent", Packed.selective_scan),
}


def _demand(condition: bool) -> None:
    if not condition:
        raise CannotPackError("there is no kernel for its sizes or types")


def _tokens(value: torch.Tensor) -> torch.Tensor:
    """[1, T, ...] with all of a token in one piece; tokens may lie apart."""
    want = 1
    for size, stride in zip(reversed(value.shape[2:]), reversed(value.stride()[2:]), strict=True):
        if stride != want and size != 1:
            return value.contiguous()
        want *= size
    _demand(value.dtype in DTYPES)
    return value


# The mixer against itself.

_TRIAL = (  # steps of chunks: tokens, and their slots. Snapshots in the middle, at the end, of a decode; then from them
    ((19, StateUse(-1, 0, 8, 1)), (1, StateUse(-1, 2)), (3, StateUse(-1, 3, 3, 4))),
    ((1, StateUse(0, 5)), (1, StateUse(4, 6, 1, 7)), (6, StateUse(1, 8)), (3, StateUse(2, 9, 2, 10))),
)
_SLOTS = 11


@torch.no_grad()
def _disagreement(recurrence: Recurrence, mixer: Mixer) -> str:
    """How the packed way differs from the mixer's own; "" if it does not."""
    dtype = next(v.dtype for v in mixer.asked.values() if isinstance(v, torch.Tensor))
    packed = mixer.packed
    answers: list[list[torch.Tensor]] = []
    pools = []
    for way in (None, packed):
        mixer.packed = way
        generator = torch.Generator().manual_seed(0)
        pools.append(torch.zeros((_SLOTS, recurrence.width), dtype=torch.uint8))
        try:
            answers.append([_answer(recurrence, mixer, pools[-1], step, generator) for step in _TRIAL])
        except Exception as error:  # model code, and whatever it does with what our functions return
            return f"cannot be tried: {error}" if way is None else f"do not run: {error}"
    mixer.packed = packed
    for own, ours in zip(*answers, strict=True):
        if not (by := _off(ours, own)) <= _ALLOWED[own.dtype]:
            return f"are off by {by:.2g}"
    for (kind, _), field in mixer.fields.items():
        own, ours = (pool.view(field.dtype)[:, field.begin : field.end] for pool in pools)
        if not (by := _off(ours, own)) <= _ALLOWED[dtype]:
            return f"leave a {kind} state that is off by {by:.2g}"
    return ""


def _answer(
    recurrence: Recurrence, mixer: Mixer, pool: torch.Tensor, step: Any, generator: torch.Generator
) -> torch.Tensor:
    chunks, first = [], 0
    for tokens, use in step:
        chunks.append(Chunk(first, tokens, 0, [], (), use))
        first += tokens
    given = {name: in_place_of(value, first, generator) for name, value in mixer.asked.items()}
    with recurrence.during([pool], chunks):
        answer = mixer.forward(**given)
    return answer[0] if isinstance(answer, tuple) else answer


def in_place_of(value: Any, tokens: int, generator: torch.Generator) -> Any:
    """What a mixer may be called with for so many tokens, from what it was called with in the probe."""
    if isinstance(value, torch.Tensor):
        return torch.randn((1, tokens, *value.shape[2:]), generator=generator).to(value.dtype)
    if isinstance(value, tuple | list):
        return type(value)(in_place_of(v, tokens, generator) for v in value)
    return value


def _off(ours: torch.Tensor, own: torch.Tensor) -> float:
    """Of the row that is furthest off, as a share of a usual row. A NaN is no agreement."""
    a, b = ours.float(), own.float()
    return ((a - b).square().mean(-1).sqrt().max() / b.square().mean().sqrt().clamp(min=1e-20)).item()
