"""Compiles the kernels for this machine's processor, once, and keeps the result.

1. The name of the result holds the sources, the compiler and the processor's features: another processor, another
   file, so a cache directory may be shared by different machines.
2. A lock file lets one process compile while others wait; the file appears whole or not at all.
3. Where there is no compiler, or it fails, the reason is a value: the engine goes on with torch's operators.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from settings.cache import cache_directory, writable_cache

_SOURCES = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
# What a processor may have for products, best first, and the features (Linux's names) that make the difference.
_FEATURES = {"amx": ("amx_tile", "amx_bf16", "amx_int8"), "avx512-bf16": ("avx512_bf16",), "avx512": ("avx512f",)}
# A build may be held to less than this processor has; Library.isa says what came of it.
LEVELS = (*_FEATURES, "vectors")
_AS_OPTION = {"avx512_bf16": "avx512bf16", "amx_tile": "amx-tile", "amx_bf16": "amx-bf16", "amx_int8": "amx-int8"}
ISA_VARIABLE = "DIPTYCH_NATIVE_ISA"
_COMPILE_S = 300


class NativeBuildError(Exception):
    """The kernels cannot be compiled here; the message says why and what would help."""


def built_library(isa: str = "") -> Path:
    """The library's file, compiled now if it is not there yet. Raises NativeBuildError.

    `isa`: the best of LEVELS that it may use; empty = as ISA_VARIABLE says, or all that the processor has.
    """
    isa = isa or os.environ.get(ISA_VARIABLE, "") or LEVELS[0]
    if isa not in LEVELS:
        raise NativeBuildError(f"{ISA_VARIABLE} is {isa}; leave it unset, or set it to one of {', '.join(LEVELS)}")
    compiler = _compiler()
    flags = (*_FLAGS, *_left_out(isa, processor_features()))
    target = cache_directory() / "native" / f"kernels-{_fingerprint(compiler, flags)}.so"
    if os.path.exists(target):
        return target
    try:
        target = writable_cache("native") / target.name
        with (target.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(compiler, flags, target)
    except OSError as error:
        raise NativeBuildError(
            f"{target.parent} cannot be written ({error}); set DIPTYCH_HOME to a directory that can"
        ) from None
    return target


def runs_here(isa: str) -> bool:
    """Whether this processor has what the level is named after."""
    return set(_FEATURES.get(isa, ())) <= processor_features()


def processor_features() -> frozenset[str]:
    """By Linux's names; none where nobody tells, and on other processors than x86."""
    lines = (line.partition(":") for line in _processor().splitlines())
    return frozenset(word for name, _, words in lines if name.strip() == "flags" for word in words.split())


def _left_out(isa: str, features: frozenset[str]) -> list[str]:
    """Only what the processor has: so a level that it reaches anyway is one build, and no compiler is told of
    instructions that it does not know.
    """
    better = LEVELS[: LEVELS.index(isa)]
    return [f"-mno-{_AS_OPTION.get(f, f)}" for level in better for f in _FEATURES[level] if f in features]


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("g++", "clang++", "c++"):
        found = shutil.which(name)
        if found:
            return found
    raise NativeBuildError(f"there is no C++ compiler ({wanted or 'g++, clang++'}); install one, for example g++")


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    h = hashlib.sha256(" ".join((*flags, platform.machine(), _processor())).encode())
    for file in sorted((*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h"))):
        h.update(file.read_bytes())
    stat = os.stat(compiler)
    h.update(f"{os.path.realpath(compiler)} {stat.st_size} {stat.st_mtime_ns}".encode())
    return h.hexdigest()[:16]


def _processor() -> str:
    """Model and features, as Linux tells them; elsewhere what the platform module knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")})
    )


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as making:
        made = Path(making) / "kernels.so"
        command = [compiler, *flags, "-o", str(made), str(_SOURCES / "stack.cpp")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMPILE_S)
        except subprocess.TimeoutExpired:
            raise NativeBuildError(
                f"{compiler} did not finish within {_COMPILE_S} s; is the machine overloaded?"
            ) from None
        if done.returncode != 0:
            problem = next((line for line in done.stderr.splitlines() if "error" in line), "it gave no reason")
            raise NativeBuildError(f"{compiler} cannot compile the kernels: {problem.strip()[:300]}")
        made.rename(target)


if __name__ == "__main__":  # of `make setup`: so that no first start waits; without a compiler torch serves
    try:
        built_library()
    except NativeBuildError as error:
        print(f"no native kernels, the engine runs on torch's operators: {error}")
