"""The compiled kernels as Python sees them: structures by ctypes, one team of threads a process.

Every call releases the interpreter's lock while it runs. Calls come from one thread at a time: the engine's.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from engine.native.build import NativeBuildError, built_library

DTYPES = (torch.float32, torch.bfloat16)
WIDEST_HEAD = 1024  # elements of a key; attention.h has it as well


class CChunk(ctypes.Structure):
    _fields_ = [("first_row", c_int32), ("num_tokens", c_int32), ("start", c_int32), ("table_at", c_int32)]


class CLayer(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_void_p)
            for name in (
                *("input_norm", "post_norm", "q_norm", "k_norm"),
                *("qkv", "out", "gate_up", "down"),
                *("qkv_bias", "out_bias", "gate_up_bias", "down_bias"),
            )
        ),
        *((name, c_int32) for name in ("qkv_bits", "out_bits", "gate_up_bits", "down_bits")),
    ]


class CModel(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_int32)
            for name in (
                *("is_bf16", "hidden", "heads", "kv_heads", "head_dim"),
                *("intermediate", "vocabulary", "num_layers", "rotary"),
                "head_bits",
            )
        ),
        ("epsilon", c_float),
        ("scale", c_float),
        *((name, c_void_p) for name in ("cos", "sin", "final_norm", "head", "embedding", "layers")),
    ]


class CStep(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("num_tokens", "num_chunks", "num_kept")),
        *((name, c_void_p) for name in ("token_ids", "positions", "kept", "chunks", "tables", "pool")),
        ("block_tokens", c_int64),
        ("rounding", c_int64),
        ("logits", c_void_p),
        *((name, c_void_p) for name in ("seconds", "given", "made")),
    ]


class CExperts(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("is_bf16", "count", "hidden", "inner", "columns", "bits")),
        *((name, c_float) for name in ("alpha", "limit", "plus", "cube")),
        *((name, c_void_p) for name in ("up", "down", "up_bias", "down_bias", "load")),
    ]


class CStates(ctypes.Structure):
    _fields_ = [
        ("runs", c_void_p),
        ("num_runs", c_int64),
        ("pool", c_void_p),
        ("slot_bytes", c_int64),
        ("offset", c_int64),
    ]


class CStateSpace(ctypes.Structure):
    symbol = "diptych_state_space"
    _fields_ = [
        *((name, c_int32) for name in ("heads", "groups", "width", "size", "softplus")),
        *((name, c_float) for name in ("least", "most")),
        *((name, c_void_p) for name in ("x", "b", "c", "dt")),
        *((name, c_int64) for name in ("x_step", "b_step", "c_step", "dt_step")),
        *((name, c_void_p) for name in ("a", "d", "dt_bias", "out")),
    ]


class CDeltaRule(ctypes.Structure):
    symbol = "diptych_delta_rule"
    _fields_ = [
        *((name, c_int32) for name in ("heads", "key_heads", "keys", "values", "decays", "normalize")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("q", "k", "v")),
        *((name, c_int64) for name in ("q_step", "k_step", "v_step")),
        *((name, c_void_p) for name in ("decay", "beta", "out")),
    ]


class CSelectiveScan(ctypes.Structure):
    symbol = "diptych_selective_scan"
    _fields_ = [
        *((name, c_int32) for name in ("channels", "size")),
        *((name, c_void_p) for name in ("x", "b", "c")),
        *((name, c_int64) for name in ("x_step", "b_step", "c_step")),
        *((name, c_void_p) for name in ("dt", "a", "d", "out")),
    ]


class CConvolution(ctypes.Structure):
    symbol = "diptych_convolution"
    _fields_ = [
        *((name, c_int32) for name in ("channels", "taps", "columns", "silu")),
        *((name, c_void_p) for name in ("weight", "bias", "x")),
        ("x_step", c_int64),
        ("out", c_void_p),
    ]


CRecurrent = CStateSpace | CDeltaRule | CSelectiveScan | CConvolution

WHOLE, UP, DOWN = range(3)  # experts.h: Stage


class CLook(ctypes.Structure):
    _fields_ = [
        ("window", c_int32),
        ("chunk", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
    ]


class Library:
    """`isa`: what the products run on: amx, avx512-bf16, avx512 or vectors. `cpus`: one for each thread, or none."""

    def __init__(self, handle: ctypes.CDLL, threads: int, cpus: tuple[int, ...] = ()) -> None:
        self._handle = handle
        self.threads, self.cpus = threads, cpus
        self.isa = handle.diptych_isa().decode()

    def packed_bytes(self, weight: torch.Tensor) -> int:
        """What `weight` [n, k] takes when packed; a multiple of 4 KiB."""
        is_bf16 = weight.dtype == torch.bfloat16
        return -(-self._handle.diptych_packed_bytes(is_bf16, *weight.shape) // 4096) * 4096

    def pack_experts(self, experts: list[list[torch.Tensor]]) -> torch.Tensor:
        """For each expert weights of one shape [n, k], as `pack` takes them; one expert after the other."""
        n, k = experts[0][0].shape
        size = self._handle.diptych_packed_bytes(experts[0][0].dtype == torch.bfloat16, n, k) * len(experts[0])
        out = torch.empty((len(experts), size), dtype=torch.uint8)
        self.large_pages(out)
        for weights, place in zip(experts, out, strict=True):
            self.pack(weights, place)
        return out

    def pack(self, weights: list[torch.Tensor], out: torch.Tensor) -> None:
        """Weights of one shape [n, k], rows contiguous -> their panels as bytes: one of each in turn."""
        n, k = weights[0].shape
        is_bf16 = weights[0].dtype == torch.bfloat16
        panel = self._handle.diptych_packed_bytes(is_bf16, 1, k)
        assert out.numel() >= self._handle.diptych_packed_bytes(is_bf16, n, k) * len(weights)
        for index, weight in enumerate(weights):
            assert weight.shape == (n, k)
            assert weight.stride(1) == 1
            at = out.data_ptr() + index * panel
            self._handle.diptych_pack(is_bf16, weight.data_ptr(), n, k, weight.stride(0), at, len(weights))

    def large_pages(self, unwritten: torch.Tensor) -> None:
        """Asks the operating system for large pages: fewer address look-ups where it grants them."""
        self._handle.diptych_large_pages(unwritten.data_ptr(), unwritten.numel() * unwritten.element_size())

    def forward(self, model: CModel, step: CStep) -> None:
        self._handle.diptych_forward(ctypes.byref(model), ctypes.byref(step))

    def attention(
        self, step: CStep, look: CLook, values: int, layers: int, layer: int,
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """query, out [T, heads, head_dim]; key, value [T, kv_heads, head_dim]; all contiguous. With `values` > 0 the
        pool is latent: nobody looks at `value`, and out is [T, heads, values].
        """
        self._handle.diptych_attention(
            query.dtype == torch.bfloat16, ctypes.byref(step), ctypes.byref(look),
            query.shape[1], key.shape[1], query.shape[2], values,
            layers, layer, query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
        )  # fmt: skip

    def experts(
        self, experts: CExperts, stage: int, chosen: torch.Tensor, weights: torch.Tensor,
        x: torch.Tensor | None, middle: torch.Tensor | None, out: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """chosen [rows, choices] int64, weights float32; x, out [rows, hidden]; all contiguous (experts.h)."""
        self._handle.diptych_experts(
            ctypes.byref(experts), stage, *chosen.shape, chosen.data_ptr(), weights.data_ptr(),
            *(None if t is None else t.data_ptr() for t in (x, middle, out)),
        )  # fmt: skip

    def product(self, experts: CExperts, rows: int, zeros: int, x: torch.Tensor, out: torch.Tensor) -> None:
        """A linear layer is one expert that every row chose. x [rows, k], out [rows, n]; at `zeros` [rows] int64."""
        self._handle.diptych_experts(
            ctypes.byref(experts), UP, rows, 1, zeros, None, x.data_ptr(), out.data_ptr(), None
        )  # fmt: skip

    def block(self, experts: CExperts, rows: int, zeros: int, scales: int, x: torch.Tensor, out: torch.Tensor) -> None:
        """A feed-forward block, likewise; at `scales` [rows] float32."""
        self._handle.diptych_experts(
            ctypes.byref(experts), WHOLE, rows, 1, zeros, scales, x.data_ptr(), None, out.data_ptr()
        )  # fmt: skip

    def norm(self, epsilon: float, weight: int, width: int, x: torch.Tensor, out: torch.Tensor) -> None:
        """Of rows of that width; at `weight` float32, x and out of one type and contiguous."""
        is_bf16 = x.dtype == torch.bfloat16
        self._handle.diptych_norm(
            is_bf16, x.numel() // width, width, epsilon, weight, x.data_ptr(), out.data_ptr()
        )  # fmt: skip

    def recurrent(self, is_bf16: bool, states: CStates, layer: CRecurrent) -> None:
        """Part of a recurrent layer, over a step's packed row (recurrent.h)."""
        getattr(self._handle, layer.symbol)(is_bf16, ctypes.byref(states), ctypes.byref(layer))

    def read(self, data: torch.Tensor) -> None:
        """Reads all of `data` once with every thread: what memory gives at best."""
        self._handle.diptych_read(data.data_ptr(), data.numel() * data.element_size())

    def products_of_registers(self, dtype: torch.dtype, rounds: int) -> float:
        """What products could do at most: operations done by all threads; 0 where no peak is known (peak.h)."""
        return self._handle.diptych_products(dtype == torch.bfloat16, rounds)


_lock = threading.Lock()
_libraries: dict[Path, Library] = {}


def load_library(threads: int, cpus: tuple[int, ...] = (), isa: str = "") -> Library:
    """Compiles if need be. Another number of threads than before, or other processors, replace the team.

    `isa` as built_library says. Raises NativeBuildError.
    """
    file = built_library(isa)
    with _lock:
        known = _libraries.get(file)
        if known is None or (known.threads, known.cpus) != (threads, cpus):
            handle = _declared(ctypes.CDLL(str(file)))
            if handle.diptych_start(threads, (c_int32 * len(cpus))(*cpus), len(cpus)):
                raise NativeBuildError("the operating system does not permit the processor's matrix tiles (AMX)")
            _libraries[file] = Library(handle, threads, cpus)
        return _libraries[file]


def ask_for_large_pages(unwritten: torch.Tensor) -> None:
    """Of a tensor in main memory that nobody has written yet; without native kernels nothing happens."""
    library = next(iter(_libraries.values()), None)
    if library is not None:
        library.large_pages(unwritten)


def _declared(handle: ctypes.CDLL) -> ctypes.CDLL:
    handle.diptych_isa.restype = ctypes.c_char_p
    handle.diptych_packed_bytes.restype = c_int64
    handle.diptych_packed_bytes.argtypes = [c_int32, c_int64, c_int64]
    handle.diptych_pack.argtypes = [c_int32, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64]
    handle.diptych_forward.argtypes = [c_void_p, c_void_p]
    handle.diptych_attention.argtypes = [
        c_int32, c_void_p, c_void_p, *[c_int32] * 6, *[c_void_p] * 4
    ]  # fmt: skip
    handle.diptych_experts.argtypes = [c_void_p, c_int32, c_int64, c_int64, *[c_void_p] * 5]
    handle.diptych_experts.restype = None
    handle.diptych_norm.argtypes = [c_int32, c_int64, c_int64, c_float, *[c_void_p] * 3]
    handle.diptych_norm.restype = None
    for layer in (CStateSpace, CDeltaRule, CSelectiveScan, CConvolution):
        function = getattr(handle, layer.symbol)
        function.argtypes = [c_int32, c_void_p, c_void_p]
        function.restype = None
    handle.diptych_large_pages.argtypes = [c_void_p, c_int64]
    handle.diptych_read.argtypes = [c_void_p, c_int64]
    handle.diptych_read.restype = ctypes.c_double
    handle.diptych_products.argtypes = [c_int32, c_int64]
    handle.diptych_products.restype = ctypes.c_double
    return handle
