"""`make test-anywhere`: the tests that could depend on the processor, as if on others, one after another.

The host's libraries choose their code by processor. Variables hold each of them to less: OpenBLAS (numpy), MKL, oneDNN
and ATen (torch), and our native kernels. What fails under one of these and not without is a bug; see
docs/batch-invariance.md, "Tests on other machines".
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from engine.native.build import ISA_VARIABLE, runs_here

ROOT = Path(__file__).resolve().parents[2]
SUBSET = (
    "tests/unit/engine",
    "tests/contract/test_attention.py",
    "tests/contract/test_attention_choice.py",
    "tests/contract/test_fused.py",
    "tests/contract/test_graphs.py",
    "tests/model",
)


@dataclass(frozen=True)
class Machine:
    """`needs`: a level of the native kernels; code for what the processor lacks would end the process."""

    variables: dict[str, str]
    needs: str = "vectors"
    one_processor: bool = False


MACHINES = {
    "avx2": Machine(
        {
            "OPENBLAS_CORETYPE": "Haswell",
            "OPENBLAS_L2_SIZE": "524288",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "ATEN_CPU_CAPABILITY": "avx2",
            ISA_VARIABLE: "vectors",
        }
    ),
    "avx512": Machine(
        {
            "OPENBLAS_CORETYPE": "SkylakeX",
            "MKL_ENABLE_INSTRUCTIONS": "AVX512",
            "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
            "ATEN_CPU_CAPABILITY": "avx512",
            ISA_VARIABLE: "avx512",
        },
        needs="avx512",
    ),
    "sse": Machine(
        {
            "OPENBLAS_CORETYPE": "Nehalem",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "ATEN_CPU_CAPABILITY": "default",
            ISA_VARIABLE: "vectors",
        }
    ),
    "one processor": Machine({}, one_processor=True),
}


def command(machine: Machine, tests: list[str]) -> list[str]:
    # Held to less, everything is slower: time decides nothing here.
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout", "900", "-q"]
    if machine.one_processor:
        return ["taskset", "-c", str(min(os.sched_getaffinity(0))), *words, *tests]
    return [*words, "-n", "2", "--dist", "loadscope", "--no-loadscope-reorder", *tests]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-anywhere", description=__doc__.splitlines()[0])
    parser.add_argument("--machine", choices=MACHINES, action="append", help="only this one; may be repeated")
    parser.add_argument("tests", nargs="*", help="instead of those that could depend on the processor")
    options = parser.parse_args()
    failed = []
    for name in options.machine or MACHINES:
        machine = MACHINES[name]
        if not runs_here(machine.needs):
            print(f"{name}: left out, this processor has no {machine.needs}", flush=True)
            continue
        words = command(machine, options.tests or list(SUBSET))
        print(f"{name}: {' '.join(f'{k}={v}' for k, v in machine.variables.items())} {' '.join(words)}", flush=True)
        began = time.monotonic()
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, **machine.variables}, check=False)
        print(
            f"{name}: {'passed' if done.returncode == 0 else 'FAILED'} after {time.monotonic() - began:.0f} s",
            flush=True,
        )
        failed += [name] * (done.returncode != 0)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
