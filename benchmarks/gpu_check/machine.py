"""What the machine is, and its measured ceilings."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu_check.context import Check, significant

_PACKAGES = ("torch", "triton", "transformers", "numpy", "pydantic", "nixl", "nixl-cu12", "nixl-cu13", "xxhash")
_NIXL_MODULES = ("nixl_cu12", "nixl_cu13", "nixl")


def environment(check: Check, found: dict[str, Any]) -> None:
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        found[package] = _version(package)
    found["nixl_importable"] = any(find_spec(m) is not None for m in _NIXL_MODULES)
    found["grpc_importable"] = find_spec("grpc") is not None
    found["c_compiler"] = shutil.which("cc") or shutil.which("gcc") or "not present (Triton needs one)"
    found["cuda_of_torch"] = torch.version.cuda or "none"
    found["device"] = str(check.device)
    if check.on_gpu:
        properties = torch.cuda.get_device_properties(check.device)
        free, total = torch.cuda.mem_get_info(check.device)
        found["name"] = properties.name
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gib"] = round(total / 2**30, 1)
        found["free_gib"] = round(free / 2**30, 1)
        found["driver"] = _driver()
    else:
        found["threads"] = torch.get_num_threads()
    check.table(("environment", ""), list(found.items()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not present"


def _driver() -> str:
    """nvidia-smi may be missing where the driver is not."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def ceilings(check: Check, found: dict[str, Any]) -> None:
    """The best of several sizes of each. Later figures are shares of these, not of a data sheet."""
    repeats = 3 if check.tiny else 30
    rows = []
    sizes = (128, 256) if check.tiny else (2048, 4096, 8192, 12288)
    matmul: dict[str, float] = {}
    for size in sizes:
        a = torch.randn(size, size, device=check.device, dtype=torch.bfloat16)
        b = torch.randn(size, size, device=check.device, dtype=torch.bfloat16)
        out = torch.empty_like(a)
        took = check.seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), repeats)
        matmul[str(size)] = significant(2 * size**3 / took / 1e12)
        rows.append((f"matmul bf16 {size}", f"{matmul[str(size)]:.4g} TFLOP/s"))
    copy: dict[str, float] = {}
    for mib in (1, 4) if check.tiny else (64, 512, 2048):
        if 3 * (mib << 20) > check.free_bytes():
            continue
        source = torch.ones(mib << 20, dtype=torch.uint8, device=check.device)
        target = torch.empty_like(source)
        took = check.seconds(lambda s=source, t=target: t.copy_(s), repeats)
        copy[str(mib)] = significant(2 * (mib << 20) / took / 1e9)  # every byte is read and written
        rows.append((f"copy {mib} MiB", f"{copy[str(mib)]:.4g} GB/s"))
    # A small copy may stay in cache: the ceiling of memory is that of the largest.
    found["matmul_tflops_by_size"] = matmul
    found["copy_gb_per_s_by_mib"] = copy
    found["matmul_tflops"] = max(matmul.values())
    found["copy_gb_per_s"] = list(copy.values())[-1]
    check.table(("ceilings (reads and writes counted)", ""), rows)
