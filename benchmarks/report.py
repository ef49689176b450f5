"""Where, when, of what and by which command a figure was measured."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from settings.processors import usable

RESULTS = Path(__file__).parent / "results"
_smoke = False


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
        "machine": f"{_cores()} cores, {cpu}, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cores() -> str:
    mine, all_of_them = usable(), os.cpu_count() or 1
    return str(all_of_them) if mine == all_of_them else f"{mine} of {all_of_them}"


def _module() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).stem


def parse(parser: argparse.ArgumentParser, **smoke: Any) -> argparse.Namespace:
    """The script's arguments. With --smoke: those given here in place of theirs, and nothing is kept.

    A SIGTERM, of `timeout` for example, is an exit from here on: what the script started is stopped.
    """
    global _smoke
    parser.add_argument("--smoke", action="store_true", help="only see that it runs: seconds, and no result is kept")
    arguments = parser.parse_args()
    if arguments.smoke:
        _smoke = True
        for name, value in smoke.items():
            assert hasattr(arguments, name), name
            setattr(arguments, name, value)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    return arguments


def save(name: str, result: dict[str, Any]) -> None:
    """One JSON line on the terminal, the same as a dated file."""
    whole = {"benchmark": name, **provenance(), **result}
    print(json.dumps(whole))
    if not _smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}-{whole['date'][:10]}.json").write_text(json.dumps(whole, indent=1) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
