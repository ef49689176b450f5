"""Runs the sections one after another; see the package's own words, or `--help`.

exit 0   every section ran, or was skipped with a reason
exit 1   a section failed
exit 2   there is nothing to check: no CUDA device, or no torch
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import benchmarks.gpu_check
from benchmarks.report import RESULTS, provenance, table

if TYPE_CHECKING:
    from benchmarks.gpu_check.context import Check

# Name, module, function, and the share of the time that is left after which a section should stop by itself.
SECTIONS = (
    ("environment", "machine", "environment", 0.2),
    ("ceilings", "machine", "ceilings", 0.2),
    ("attention", "attention", "attention", 0.4),
    ("kernels", "kernels", "kernels", 0.1),
    ("engine", "engine", "engine", 0.4),
    ("families", "families", "families", 0.3),
    ("ranks", "ranks", "ranks", 0.3),
    ("handoff", "handoff", "handoff", 0.4),
    ("phases", "throughput", "phases", 0.3),
    ("throughput", "throughput", "throughput", 1.0),
)
_OVERTIME_S = 90.0  # a section that hangs is ended so long after the budget, with every stack printed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_check",
        description=benchmarks.gpu_check.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="", help="cuda, cuda:N or cpu; unset = the first CUDA device")
    parser.add_argument("--tiny", action="store_true", help="all of it in small, to see that it runs")
    parser.add_argument("--budget-s", type=float, default=480.0, help="what does not fit is skipped and said so")
    parser.add_argument("--only", default="", help="sections to run, with commas")
    parser.add_argument("--without", default="", help="attention backends to leave out, with semicolons")
    parser.add_argument("--resume", type=Path, help="a file to go on from (used after the device broke)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the dated file")
    arguments = parser.parse_args()
    wanted = [s for s in arguments.only.split(",") if s]
    unknown = set(wanted) - {name for name, *_ in SECTIONS}
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(n for n, *_ in SECTIONS)}")
    try:
        import torch
    except ImportError as error:
        print(f"torch does not load ({error}); install it: pip install torch", file=sys.stderr)
        return 2
    if not arguments.device.startswith("cpu") and not torch.cuda.is_available():
        print("no CUDA device (torch sees none); run on a machine with a GPU, or in small with --device cpu --tiny")
        return 2
    from benchmarks.gpu_check.context import Check

    device = torch.device(arguments.device or "cuda")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    faulthandler.dump_traceback_later(arguments.budget_s + _OVERTIME_S, exit=True)
    started = time.monotonic()
    check = Check(device, arguments.tiny, started + arguments.budget_s, started=started)
    check.without = tuple(n for n in arguments.without.split(";") if n)
    files = [arguments.results / f"gpu-check-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.json"]
    if os.environ.get("OUT"):
        files.append(Path(os.environ["OUT"]) / files[0].name)
    where = {"benchmark": "gpu-check", **provenance(), "tiny": arguments.tiny, "budget_s": arguments.budget_s}
    if arguments.resume:
        check.sections |= json.loads(arguments.resume.read_text())["sections"]
    names = wanted or [name for name, *_ in SECTIONS]
    for name, module, function, share in SECTIONS:
        if name not in names:
            continue
        run_section(check, name, module, function, started + arguments.budget_s, share)
        write(files, {**where, "took_s": round(time.monotonic() - started, 1), "sections": check.sections})
        if check.sections[name]["status"] == "failed" and not check.device_works():
            go_on = after_a_broken_device(check, name, [n for n in names if n in remaining(name)])
            write(files, {**where, "sections": check.sections})
            if go_on is None:
                break
            check.say(f"{name}: the device works no more in this process; going on in a new one")
            left = max(1.0, started + arguments.budget_s - time.monotonic())
            options = ["--budget-s", f"{left:.0f}", "--device", str(device), "--results", str(arguments.results)]
            options += ["--tiny"] if arguments.tiny else []
            go_on += ["--resume", str(files[0]), *options]
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_check", *go_on])
    faulthandler.cancel_dump_traceback_later()
    table(("section", "", "s"), [(n, s["status"], s["took_s"]) for n, s in check.sections.items()])
    print(f"wrote {', '.join(map(str, files))}", flush=True)
    return 1 if "failed" in [s["status"] for s in check.sections.values()] else 0


def remaining(name: str) -> list[str]:
    order = [n for n, *_ in SECTIONS]
    return order[order.index(name) + 1 :]


def after_a_broken_device(check: Check, name: str, rest: list[str]) -> list[str] | None:
    """Options of a new process. A section that knows which backend did it runs again without that one."""
    found = check.sections[name]
    broke = found.get("broke_the_device")
    without = list(check.without)
    if broke and broke not in without:
        without.append(broke)
        check.sections[f"{name}, with {broke}"] = check.sections.pop(name)
        rest = [name, *rest]
    return ["--only", ",".join(rest), "--without", ";".join(without)] if rest else None


def run_section(check: Check, name: str, module: str, function: str, end: float, share: float) -> str:
    """ "ok", "skipped" or "failed". Whatever happens, the findings so far are kept."""
    from benchmarks.gpu_check.context import Absent

    found: dict[str, Any] = {"status": "ok", "took_s": 0.0}
    check.sections[name] = found
    begun = time.monotonic()
    left = end - begun
    if left <= 0:
        found |= {"status": "skipped", "why": "the time was over; raise --budget-s"}
        check.say(f"{name}: skipped, {found['why']}")
        return "skipped"
    check.deadline = begun + left * share
    check.say(f"{name}: begins, {check.left_s():.0f} s")
    try:
        getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), function)(check, found)
    except Absent as reason:
        found |= {"status": "skipped", "why": str(reason)}
        check.say(f"{name}: skipped, {reason}")
    except ModuleNotFoundError as error:
        found |= {"status": "failed", "error": explain(error), "traceback": traceback.format_exc()}
        print(traceback.format_exc(), flush=True)
        check.say(f"{name}: FAILED, {found['error']}")
    except Exception as error:
        found |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        print(traceback.format_exc(), flush=True)
        check.say(f"{name}: FAILED")
    found["took_s"] = round(time.monotonic() - begun, 1)
    check.free_memory()
    return found["status"]


def explain(error: ModuleNotFoundError) -> str:
    package = (error.name or "?").split(".")[0]
    if (RESULTS.parents[1] / package).exists() or package == "diptych":
        return f"{error}; run from the checkout, with PYTHONPATH=.:proto"
    return f"{error}, which the engine imports; install it: pip install {package}"


def write(files: list[Path], result: dict[str, Any]) -> None:
    """After every section: a machine that goes away leaves what was found. Whole or not at all."""
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1, default=str) + "\n")
        part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
