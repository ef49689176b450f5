"""Compiles our Triton kernels to machine code for GPUs that need not be there. Exits 1 if any is too large."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.attention import triton_kernels as kernels
from engine.attention.triton_paged import Sizes
from engine.fused import kernels as fused

SHARED_LIMIT_BYTES = 99 * 1024  # compute capability 8.6 and 8.9, the smallest since 8.0
STRIDES = ("pool_", "query_", "key_", "value_")
TYPES = {"scale": "fp32", "cap": "fp32", "epsilon": "fp32", "layer": "i32", "partial": "*fp32", "partial_log2": "*fp32"}
TENSORS = {
    "output", "query", "pool", "key", "value", "sinks",
    "out", "stream", "delta", "weight", "qkv", "cos", "sin", "query_weight", "key_weight", "gate_up",
}  # fmt: skip


def compile_kernel(kernel: Any, capability: int, dtype: str, constants: dict[str, Any]) -> Any:
    signature, constexprs, hints = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constexprs[name] = "constexpr", constants[name]
            continue
        is_stride = name not in TENSORS and name.startswith(STRIDES)
        signature[name] = TYPES.get(name) or ("i32" if is_stride else f"*{dtype}" if name in TENSORS else "*i32")
        if is_stride or signature[name].startswith("*"):
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_stages": 2})


def main() -> int:
    too_large = False
    for capability, dtype, element_bytes, dim, rest, group, rule in (
        (80, "fp16", 2, 256, 0, 8, {}), (80, "bf16", 2, 80, 0, 3, {"WINDOW": 128, "SINKS": True}),
        (90, "bf16", 2, 128, 0, 4, {"CHUNK": 8192, "CAPPED": True}), (90, "fp32", 4, 256, 0, 1, {}),
        (80, "bf16", 2, 512, 64, 128, {}), (90, "bf16", 2, 512, 64, 16, {"CAPPED": True}),
    ):  # fmt: skip
        sizes = Sizes.of(group, dim, element_bytes)
        constants = {
            "GROUP": group, "KV_HEADS": 8, "HEADS": 8, "HEADS_PADDED": 8, "DIM": dim,
            "DIM_PADDED": 1 << (dim - 1).bit_length(), "BLOCK_TOKENS": 32, "KEYS": sizes.keys,
            "REST": rest, "REST_PADDED": max(16, rest), "LATENT": rest > 0,
            "WINDOW": 0, "CHUNK": 0, "SINKS": False, "CAPPED": False,
        } | rule  # fmt: skip
        few = {"ROWS": sizes.few_rows, "SPLIT_TOKENS": sizes.split_tokens}
        for kernel, own in (
            (kernels.write_kernel, {}),
            (kernels.attend_kernel, {"ROWS": sizes.rows, "SPLIT_TOKENS": 0}),
            (kernels.attend_kernel, few),
            (kernels.reduce_kernel, few),
        ):
            shared_bytes = compile_kernel(kernel, capability, dtype, constants | own).metadata.shared
            too_large |= shared_bytes > SHARED_LIMIT_BYTES
            print(
                f"sm_{capability} {dtype} head_dim {dim} + {rest} {kernel.__name__} {own}: {shared_bytes} bytes shared"
            )
    for capability, dtype in ((80, "fp16"), (80, "fp32"), (90, "bf16")):
        for kernel, constants in (
            (fused._add_norm, {"SIZE": 4096, "SIZE_PADDED": 4096, "ADD": True}),
            (fused._add_norm, {"SIZE": 576, "SIZE_PADDED": 1024, "ADD": False}),
            (fused._gate, {"SIZE": 1536, "TILE": 1024}),
            *(
                (
                    fused._rotate,
                    {"HEADS": 32, "KV_HEADS": 8, "HALF": half, "HALF_PADDED": 64, "NORM": norm, "WRITE": write},
                )
                for half, norm, write in ((64, False, True), (64, True, True), (40, True, False))
            ),
        ):
            compile_kernel(kernel, capability, dtype, constants)
            print(f"sm_{capability} {dtype} {kernel.__name__} {constants}")
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
