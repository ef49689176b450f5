"""Every script in benchmarks/ starts on a fresh machine, and gets through a run of seconds.

Home and cache are empty: a cache of an earlier run has hidden a script that could not start. The embedded model's
weights are the only thing that is there before, as after `make setup` and `diptych model`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()
)
# Programs that a benchmark starts, and what needs more than a machine has.
STARTED = {"vllm_child", "openai_mock"}
# Those that load torch or start many processes take from ten seconds to a minute each.
LONG = {
    "adapters",
    "batch_invariance", "engine", "families", "handover", "interference", "kernels", "long_context", "masks", "memory",
    "migration", "overlap", "predictions", "quantization", "rank_kills", "recovery", "recurrent", "router",
    "router_http", "sampler", "security", "speculation", "step_cost", "telemetry", "transfer",
}  # fmt: skip
QUICK = sorted({*SCRIPTS} - STARTED - LONG - {"dashboards", "simulator"})


def environment(home: Path, model_path: Path) -> dict[str, str]:
    """An empty home; of what we keep outside the checkout, the model alone."""
    models = home / "diptych" / "models"
    models.mkdir(parents=True)
    (models / model_path.name).symlink_to(model_path)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "HF_", "DIPTYCH_"))}
    return kept | {"HOME": str(home), "DIPTYCH_HOME": str(home / "diptych"), "TMPDIR": str(home)}


def run(environment: dict[str, str], *arguments: str, timeout_s: float = 110.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


@pytest.fixture
def fresh(tmp_path: Path, model_path: Path) -> dict[str, str]:
    return environment(tmp_path, model_path)


HELP = """
import contextlib, io, json, runpy, sys
shown = {}
for name in sys.argv[1:]:
    sys.argv[1:] = ["--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, name
    shown[name] = out.getvalue()
print(json.dumps(shown))
"""


def test_every_script_says_how_it_is_used(fresh: dict[str, str]) -> None:
    """In one process: most import torch."""
    command = [sys.executable, "-c", HELP, *SCRIPTS, "gpu_check"]
    done = subprocess.run(command, cwd=ROOT, env=fresh, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, shown in json.loads(done.stdout.splitlines()[-1]).items():
        assert shown.startswith("usage:"), name
        assert ("--smoke" in shown) == (name not in STARTED | {"gpu_check"}), name


def smoke(fresh: dict[str, str], *arguments: str, timeout_s: float = 110.0) -> None:
    before = tracked()
    done = run(fresh, *arguments, "--smoke", timeout_s=timeout_s)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert tracked() == before, "a smoke run keeps no result"


def tracked() -> set[str]:
    return {
        str(path) for folder in ("benchmarks/results", "docs/images", "build") for path in (ROOT / folder).glob("*")
    }


@pytest.mark.parametrize("script", QUICK)
def test_a_run_of_seconds(script: str, fresh: dict[str, str]) -> None:
    smoke(fresh, f"benchmarks.{script}")


@pytest.mark.parametrize("what", ["agreement", "speed"])
def test_the_simulators_run_of_seconds(what: str, fresh: dict[str, str]) -> None:
    smoke(fresh, "benchmarks.simulator", what)


@pytest.mark.long
@pytest.mark.timeout(620)
@pytest.mark.parametrize("script", sorted(LONG))
def test_a_run_with_a_model(script: str, fresh: dict[str, str]) -> None:
    smoke(fresh, f"benchmarks.{script}", timeout_s=600.0)


@pytest.mark.long
@pytest.mark.timeout(620)
def test_the_check_of_a_gpu_starts_where_everything_is_installed(fresh: dict[str, str], tmp_path: Path) -> None:
    """All of it, where next to nothing is: tests/artefacts/test_gpu_check.py."""
    small = ("--device", "cpu", "--tiny", "--only", "environment,engine", "--results", str(tmp_path))
    done = run(fresh, "benchmarks.gpu_check", *small, timeout_s=600.0)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_what_a_machine_lacks_is_named(fresh: dict[str, str], tmp_path: Path) -> None:
    """No Prometheus, no GPU, no vLLM: one line says what to install, and nothing was started."""
    path = {**fresh, "PATH": str(tmp_path)}
    done = run(path, "benchmarks.dashboards", "--smoke")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "install it" in done.stderr
    done = run({**fresh, "CUDA_VISIBLE_DEVICES": ""}, "benchmarks.gpu_check")
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout
