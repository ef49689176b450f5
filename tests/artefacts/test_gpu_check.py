"""The command for machines with a GPU, held together on a machine without one."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import attention as attention_section
from benchmarks.gpu_check import backends
from benchmarks.gpu_check import ranks as ranks_section
from benchmarks.gpu_check.context import Absent, Check
from benchmarks.gpu_check.families import TINY_FAMILIES
from benchmarks.gpu_check.models import SHAPES, Weights
from benchmarks.gpu_check.throughput import decode_bytes, prefill_flops
from tests.artefacts.test_benchmarks import environment

# Prompts of 33 and 150 tokens in blocks of 32, a window of 48.
MOVED = {
    "window, sinks, experts": {"full": 7, "window(48)": 2 + 2},
    "latent, experts": {"latent full": 7},
    "Mamba 2 beside attention": {"full": 7, "state": 2},
}
ROOT = Path(__file__).resolve().parents[2]
# What a machine that was given torch and transformers need not have.
LACKING = ("grpc", "grpc_health", "google.protobuf", "ray", "opentelemetry", "typer", "pytest")


def run(
    *arguments: str, path: str = "", timeout_s: float = 115.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{path}:.:proto", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture
def check() -> Iterator[Check]:
    threads = torch.get_num_threads()
    yield Check(torch.device("cpu"), True, time.monotonic() + 60)
    torch.set_num_threads(threads)


@pytest.mark.long
@pytest.mark.timeout(620)
def test_all_of_it_in_small_on_a_bare_machine(tmp_path: Path, model_path: Path) -> None:
    """Home and caches are empty as well."""
    bare, out = tmp_path / "bare", tmp_path / "out"
    bare.mkdir()
    home = environment(tmp_path / "home", model_path)
    empty = {name: home[name] for name in ("HOME", "DIPTYCH_HOME", "TMPDIR")}
    (bare / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({LACKING!r}))\n")
    small = ("--device", "cpu", "--tiny", "--budget-s", "1500")
    done = run(*small, "--results", str(tmp_path), path=str(bare), timeout_s=600, OUT=str(out), **empty)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = tmp_path.glob("gpu-check-*.json")
    assert (out / file.name).read_text() == file.read_text()
    whole = json.loads(file.read_text())
    found = whole["sections"]
    assert list(found) == [name for name, *_ in command.SECTIONS]
    assert {s["status"] for s in found.values()} <= {"ok", "skipped"}
    assert found["environment"]["grpc_importable"] is False
    assert found["ceilings"]["matmul_tflops"] > 0
    assert found["attention"]["problems"] == []
    assert found["engine"]["torch gather + sdpa, chunked"] == "3 of 3 exact"
    assert found["engine"]["torch gather + sdpa, overlapping"] == "3 of 3 exact"
    assert set(found["attention"]["largest_difference"]) == {
        f"{backend}, {kind}, {dtype}"
        for backend in found["attention"]["cases"]
        for kind in ("full", "window, sinks", "chunk, soft cap", "latent full")
        for dtype in ("float32", "bfloat16")
    }
    assert found["kernels"]["torch gather + sdpa, 4x1x24, blocks of 8, latent full"]["decode_gb_per_s"] > 0
    for family in TINY_FAMILIES:
        own = found["families"][family.name]
        assert own["rules"] == list(family.rules)
        assert own["exact"]["torch gather + sdpa, chunked, overlapping"] == "2 of 2"
    assert found["ranks"]["ran"] == ranks_section.ON_CPU
    for name in ("exact", "window, sinks, experts"):
        assert found["ranks"][name]["chunked"] == found["ranks"][name]["batched"] == "2 of 2 exact"
    if found["environment"]["nixl_importable"]:
        moved = found["handoff"]["exact"]
        assert (moved["blocks_compared"], moved["wrong_generation"]) == (8, "fenced")
        for name, groups in MOVED.items():
            assert found["handoff"][name]["blocks_by_group"] == groups
            assert found["handoff"][name]["wrong_generation"] == "fenced"
    else:
        assert found["handoff"]["why"] == "nixl not present"
    assert found["phases"]["decode 1"]["model"] > 0
    assert found["throughput"]["variants"] == ["plain"]
    for model in ("tiny dense", "tiny MoE"):
        figures = found["throughput"][model]["torch gather + sdpa"]
        assert figures["prefill"].keys() == {"32", "64"}
        assert figures["decode"].keys() == figures["decode, overlapping"].keys() == {"1", "4"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout


def test_a_section_that_fails_keeps_its_findings(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(check: Check, found: dict[str, Any]) -> None:
        found["seen"] = 1
        raise RuntimeError("the second half")

    def absent(check: Check, found: dict[str, Any]) -> None:
        raise Absent("nothing to see")

    monkeypatch.setattr(attention_section, "attention", half)
    end = time.monotonic() + 10
    assert command.run_section(check, "attention", "attention", "attention", end, 1.0) == "failed"
    found = check.sections["attention"]
    assert found["seen"] == 1
    assert "the second half" in found["error"]
    assert "in half" in found["traceback"]
    monkeypatch.setattr(attention_section, "attention", absent)
    assert command.run_section(check, "attention", "attention", "attention", end, 1.0) == "skipped"
    assert command.run_section(check, "attention", "attention", "attention", end - 100, 1.0) == "skipped"
    assert "--budget-s" in check.sections["attention"]["why"]


def test_a_broken_device_is_left_to_a_new_process(check: Check) -> None:
    rest = command.remaining("engine")
    assert rest == ["families", "ranks", "handoff", "phases", "throughput"]
    check.sections["engine"] = {"status": "failed", "took_s": 1.0, "broke_the_device": "triton"}
    options = command.after_a_broken_device(check, "engine", rest)
    assert options == ["--only", "engine,families,ranks,handoff,phases,throughput", "--without", "triton"]
    assert list(check.sections) == ["engine, with triton"], "its failure stays on record"
    check.sections["phases"] = {"status": "failed", "took_s": 1.0}
    check.without = ("triton",)
    assert command.after_a_broken_device(check, "phases", ["throughput"]) == [
        "--only", "throughput", "--without", "triton"
    ]  # fmt: skip


@pytest.mark.long
def test_it_goes_on_in_a_new_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A device that breaks in the attention section, played: the command that takes over is run for real."""

    class TakenOver(BaseException):
        pass

    def breaks(check: Check, found: dict[str, Any]) -> None:
        found["broke_the_device"] = "a bad kernel"
        raise RuntimeError("an illegal memory access was encountered")

    def take_over(program: str, arguments: list[str]) -> None:
        raise TakenOver(arguments)

    monkeypatch.setattr(attention_section, "attention", breaks)
    monkeypatch.setattr(Check, "device_works", lambda self: False)
    monkeypatch.setattr(os, "execv", take_over)
    monkeypatch.delenv("OUT", raising=False)
    own = ["--device", "cpu", "--tiny", "--only", "ceilings,attention,phases", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *own])
    try:
        with pytest.raises(TakenOver) as taken:
            command.main()
    finally:
        faulthandler.cancel_dump_traceback_later()
    done = run(*taken.value.args[0][3:])
    assert done.returncode == 1, done.stdout + done.stderr
    (file,) = tmp_path.glob("gpu-check-*.json")
    found = json.loads(file.read_text())["sections"]
    assert list(found) == ["ceilings", "attention, with a bad kernel", "attention", "phases"]
    assert [s["status"] for s in found.values()] == ["ok", "failed", "ok", "ok"]


def test_going_on_keeps_what_was_found(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"sections": {"engine, with x": {"status": "failed", "took_s": 2.0}}}))
    done = run(
        "--device", "cpu", "--tiny", "--only", "ceilings", "--without", "x", "--resume", str(earlier),
        "--results", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1, "what failed before the restart has failed"
    (file,) = tmp_path.glob("gpu-check-*.json")
    assert list(json.loads(file.read_text())["sections"]) == ["engine, with x", "ceilings"]


def test_a_missing_package_is_named_with_the_fix(check: Check) -> None:
    end = time.monotonic() + 10
    assert command.run_section(check, "x", "no_such_section", "x", end, 1.0) == "failed"
    assert "PYTHONPATH" in check.sections["x"]["error"]
    assert "pip install xxhash" in command.explain(ModuleNotFoundError("No module named 'xxhash'", name="xxhash"))


@pytest.mark.parametrize(("fault", "said"), [("answer", "differs by"), ("bytes", "wrote other bytes"), ("nan", "nan")])
def test_a_wrong_backend_is_found(check: Check, monkeypatch: pytest.MonkeyPatch, fault: str, said: str) -> None:
    from engine.attention.gather import GatherBackend, GatherBatch

    class WrongBatch(GatherBatch):
        def attend(self, *given: Any) -> torch.Tensor:
            output = super().attend(*given)
            if fault == "answer":
                output[0, -1, -1, -1] += 0.2
            elif fault == "nan":
                output[0, 0, 0, 0] = float("nan")
            else:
                self._token_rows[-1, -1] += 1
            return output

    class WrongBackend:
        name = "wrong"

        def prepare(self, kv: torch.Tensor, chunks: list[Any], rule: Any) -> WrongBatch:
            return WrongBatch(kv, chunks, rule)

    both = [backends.Found("gather", "right", GatherBackend()), backends.Found("wrong", "wrong", WrongBackend())]
    monkeypatch.setattr(attention_section, "find_backends", lambda check: both)
    end = time.monotonic() + 60
    assert command.run_section(check, "attention", "attention", "attention", end, 1.0) == "failed"
    problems = check.sections["attention"]["problems"]
    assert problems
    assert all(p.startswith("wrong, ") and said in p for p in problems)
    assert len(problems) == check.sections["attention"]["cases"]["wrong"]


def test_a_new_backend_is_found(check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from engine import attention

    (tmp_path / "brand_new.py").write_text(
        "class BrandNewBackend:\n    name = 'brand new'\n    def prepare(self, kv, chunks): ...\n"
    )
    (tmp_path / "lacking.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.setattr(attention, "__path__", [*attention.__path__, str(tmp_path)])
    found = {f.name: f for f in backends.find_backends(check)}
    assert found["brand new"].backend is not None
    assert "a_package_that_is_not_there" in found["lacking"].absent
    for name in ("brand_new", "lacking"):
        sys.modules.pop(f"engine.attention.{name}", None)


def test_work_is_counted_as_one_counts_by_hand() -> None:
    dense, _, moe = SHAPES
    weights = Weights(dense=1000, expert=0, head=10, element_bytes=2)
    attention = 2 * 2 * 16 * 32 * 64 * (1 + 2 + 3)  # two products over 1, 2 and 3 keys, in every head of every layer
    assert prefill_flops(dense, weights, 3) == 2 * 3 * 1000 + 2 * 10 + attention
    assert decode_bytes(dense, weights, 4, 100) == 2 * 1010 + 4 * 100 * (16 * 2 * 8 * 64 * 2)
    routed = Weights(dense=1000, expert=1600, head=10, element_bytes=2)
    one = decode_bytes(moe, routed, 1, 0)
    assert one == pytest.approx(2 * (1010 + 1600 * 8 / 128))
    assert decode_bytes(moe, routed, 256, 0) == pytest.approx(2 * 2610, rel=1e-3), "a large batch touches all experts"
    assert [round(s.parameters() / 1e9, 1) for s in SHAPES] == [1.5, 8.0, 30.5]
