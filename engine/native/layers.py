"""Linear layers and norms of a model that does not run as a whole, on the native kernels.

1. A layer is replaced where it stands: the model's own code calls it as before. Feed-forward blocks are replaced whole
   where their gate is known (engine/native/mlp.py), recurrent layers too (engine/native/recurrent.py).
2. Each is held against itself first, with numbers: so it is found whether a norm multiplies by its weight or by 1 more.
3. A linear layer's weight is packed, and its own given up: only for projections that other code never reads. A tied
   head shares its weight with the embedding, which stays.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

from engine.merged_linear import MERGED, merged_paths
from engine.native.library import DTYPES, CExperts, Library
from engine.native.mlp import ZEROS, use_native_mlps
from engine.native.quantized import packed
from engine.native.recurrent import pack_mixers
from engine.quantization import Quantized, quantized
from engine.recurrent import recurrence_of

log = logging.getLogger(__name__)

_PROJECTIONS = {
    *(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down", "qkv", "gate_up", "in", "out")),
    *("lm_head", "fc1", "fc2", "dense", "eh_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "shared_expert_gate"),
    *(f"in_proj_{name}" for name in ("qkvz", "ba", "qkv", "z", "a", "b")),  # of recurrent layers, here and below
    *(f"{name}_proj" for name in ("x", "a", "b", "g", "f", "f_a", "f_b", "g_a", "g_b")),
    "output_gate",
}
_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_ROWS = 17  # of a trial: more than a tile, and no whole number of them


def use_native_layers(model: Any, library: Library, *, blocks: bool = True) -> tuple[int, int]:
    """How many linear layers and how many norms run on native kernels from now on. `blocks`: feed-forward blocks too,
    as one.
    """
    products = norms = 0
    shared: dict[int, tuple[Any, NativeProduct]] = {}
    small = quantized(model)
    mlps = use_native_mlps(model, library) if blocks else 0
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if getattr(module, "weight", None) is not None and not module.weight.numel():
            continue  # of a block that is replaced
        if isinstance(module, MERGED):
            products += _merged(module, library, shared, small, path)
        elif type(module) is nn.Linear and name in _PROJECTIONS:
            product = _product(module, library, small, [path])
            if product is not None:
                setattr(module, "forward", product)  # noqa: B010, it shadows the class's own
                module.weight = _nothing(module.weight)
                products += 1
        elif type(module).__name__.endswith("RMSNorm"):
            norm = _norm(module, library)
            if norm is not None:
                setattr(module, "forward", norm)  # noqa: B010
                norms += 1
    recurrence = recurrence_of(model)
    if recurrence is not None:
        mixers = pack_mixers(recurrence, library)
        log.info("%d of %d recurrent layers run on native kernels", mixers, len(recurrence.mixers))
    log.info(
        "%d linear layers, %d feed-forward blocks and %d norms run on native kernels (%s)",
        *(products, mlps, norms, library.isa),
    )
    return products, norms


class NativeProduct:
    """x [..., k] -> [..., n]. Holds a packed copy of the weight."""

    def __init__(
        self,
        library: Library,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scales: torch.Tensor | None = None,
        bits: int = 0,
    ) -> None:
        self._library = library
        self._out, self._in = weight.shape
        self._packed = packed(library, bits, (weight.detach(), scales))
        self._bias = None if bias is None else pad(bias.detach().float(), (0, -self._out % 32)).contiguous()
        c = self._c = CExperts()
        c.is_bf16, c.count, c.hidden, c.columns = weight.dtype == torch.bfloat16, 1, self._in, self._out
        c.bits = 0 if scales is None else bits
        c.up = self._packed.data_ptr()
        c.up_bias = None if self._bias is None else self._bias.data_ptr()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((*x.shape[:-1], self._out))
        rows = x.numel() // self._in
        self._library.product(self._c, rows, ZEROS.at(rows), x.contiguous(), out)
        return out


class _NativeNorm:
    def __init__(self, library: Library, module: Any, weight: torch.Tensor, epsilon: float) -> None:
        self._library, self._epsilon, self._own = library, epsilon, module.forward
        self._weight, self._at, self._width = weight, weight.data_ptr(), len(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in DTYPES:
            return self._own(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        self._library.norm(self._epsilon, self._at, self._width, x, out)
        return out


class _Part:
    """Of a merged product: the rows of a projection that was called on its own."""

    def __init__(self, product: NativeProduct, start: int, end: int) -> None:
        self._product, self._start, self._end = product, start, end

    def __call__(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return self._product(x)[..., self._start : self._end]


def _merged(
    module: Any, library: Library, shared: dict[int, tuple[Any, NativeProduct]], small: Quantized | None, path: str
) -> int:
    """The first of a group comes first, and computes for the others."""
    if hasattr(module, "own_rows"):
        product = _product(module, library, small, merged_paths(path))
        if product is None:
            return 0
        shared[id(module._shared)] = (module, product)
        module.linear = _Part(product, 0, len(module.weight))
        module.weight = _nothing(module.weight)
        return 1
    if id(module._shared) in shared:
        first, product = shared[id(module._shared)]
        start = sum(first._sizes[: module._index])
        module.linear = _Part(product, start, start + len(module.weight))
        module.weight = _nothing(module.weight)
    return 0


@torch.no_grad()
def _product(layer: Any, library: Library, small: Quantized | None, paths: list[str]) -> NativeProduct | None:
    """`paths`: of the layers whose rows these are."""
    weight = layer.weight
    if weight.dtype not in DTYPES or weight.device.type != "cpu":
        return None
    x = torch.randn(_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    kept = None if small is None else small.alike(paths)
    made = NativeProduct(
        library, weight, layer.bias, *((None, 0) if kept is None else (torch.cat(kept.scales), kept.bits))
    )
    if not _near(made(x), linear(x, weight, layer.bias)):
        return None
    if small is not None and kept is not None:
        small.kept.update(paths)
    return made


@torch.no_grad()
def _norm(module: Any, library: Library) -> _NativeNorm | None:
    weight: Any = getattr(module, "weight", None)
    epsilon = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
    plain = isinstance(weight, nn.Parameter) and weight.dim() == 1 and weight.dtype in DTYPES
    if not plain or not isinstance(epsilon, float) or weight.device.type != "cpu" or list(module.children()):
        return None
    x = torch.randn(_ROWS, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    x[0] *= math.sqrt(epsilon)  # a row that the epsilon changes
    try:
        theirs = module(x)
    except Exception:  # it wants more than rows: a gate, for example
        return None
    for factor in (weight.float(), 1 + weight.float()):
        made = _NativeNorm(library, module, factor.contiguous(), epsilon)
        if theirs.dtype == x.dtype and theirs.shape == x.shape and _near(made(x), theirs):
            return made
    return None


def _near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Row by row, of a row's root mean square. A NaN is no agreement."""
    a, b = ours.float(), theirs.float()
    off = (a - b).square().mean(-1).sqrt() / b.square().mean(-1).sqrt().clamp(min=1e-20)
    return off.max().item() <= _ALLOWED[ours.dtype]


def _nothing(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.new_empty(0), requires_grad=False)
