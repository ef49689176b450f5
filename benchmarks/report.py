"""Where, when, of what and by which command a figure was measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def provenance() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        except OSError:  # a bare machine has no git
            return ""
        return done.stdout.strip()

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""),
        "command": "python -m " + " ".join([_module(), *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {cpu}, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _module() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).stem


def save(name: str, result: dict[str, Any]) -> Path:
    """One JSON line on the terminal, the same as a dated file."""
    whole = {"benchmark": name, **provenance(), **result}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{whole['date'][:10]}.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
