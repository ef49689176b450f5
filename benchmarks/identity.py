"""How quickly a checkpoint's identity is computed: GB/s of hashing, and what the cache makes of it.

python -m benchmarks.identity [--gigabytes 4] [--directory DIR]

Writes files of random bytes in DIR (a temporary directory by default) and hashes them as a worker does at its start:
from the page cache, and again after the system was asked to drop them from it (then the disk is the limit, and loading
would read them anyway). Prints one JSON line, with what follows for 140 GB: 70 billion parameters in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from benchmarks.report import parse, save
from checkpoint.identity import file_digest

_LARGE_GB = 140


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--directory", type=Path, default=None)
    arguments = parse(parser, gigabytes=0.1)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as made:
        os.environ["DIPTYCH_HOME"] = str(Path(made) / "home")
        file = Path(made) / "model.safetensors"
        piece = os.urandom(64 << 20)
        with file.open("wb") as out:
            for _ in range(max(1, round(arguments.gigabytes * 1e9 / len(piece)))):
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        size_gb = file.stat().st_size / 1e9
        warm_s = _timed(file)
        _forget(Path(made) / "home")
        _drop(file)
        cold_s = _timed(file)
        again_s = _timed(file)
    rate = size_gb / warm_s
    save(
        "identity",
        {
            "gigabytes": round(size_gb, 2),
            "processors": len(os.sched_getaffinity(0)),
            "page_cache_gb_s": round(rate, 2),
            "from_disk_gb_s": round(size_gb / cold_s, 2),
            "cached_digest_ms": round(again_s * 1e3, 2),
            f"{_LARGE_GB}_gb_from_page_cache_s": round(_LARGE_GB / rate, 1),
            f"{_LARGE_GB}_gb_from_disk_s": round(_LARGE_GB * cold_s / size_gb, 1),
        },
    )


def _timed(file: Path) -> float:
    begun = time.perf_counter()
    file_digest(file)
    return time.perf_counter() - begun


def _forget(home: Path) -> None:
    for kept in (home / "identities").iterdir():
        kept.unlink()


def _drop(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    main()
