"""Threads are as many as processors may be used, whatever the machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.config import threads_per_worker
from settings import processors
from settings.processors import allowed, cpu_quota, usable


def written(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


@pytest.mark.parametrize(
    ("said", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2.0),
        ("0::/of/the/host\n", {"cpu.max": "250000 100000\n"}, 2.5),  # a container's view
        ("0::/../..\n", {"cpu.max": "250000 100000\n"}, 2.5),
        (
            "4:memory:/x\n1:cpu,cpuacct:/x\n0::/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        ("1:cpu:/x\n", {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("1:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "100\n", "cpuset/cpu.cfs_period_us": "100\n"}, None),
        ("0::/\n", {"cpu.max": "nonsense\n"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_the_tightest_quota_of_version_1_and_2(
    tmp_path: Path, said: str, files: dict[str, str], quota: float | None
) -> None:
    written(tmp_path, {"proc": said})
    assert cpu_quota(tmp_path / "proc", written(tmp_path / "groups", files)) == quota


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(("affinity", "quota", "count"), [(8, None, 8), (8, 2.9, 2), (8, 0.2, 1), (2, 6.0, 2)])
def test_both_hold(monkeypatch: pytest.MonkeyPatch, affinity: int, quota: float | None, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setattr(processors, "cpu_quota", lambda: quota)
    assert usable() == count
    assert threads_per_worker(2) == max(1, count // 2)


@pytest.mark.skipif(not shutil.which("taskset"), reason="taskset is not installed")
def test_taskset_is_heeded() -> None:
    code = "from deploy.config import threads_per_worker, usable; print(usable(), threads_per_worker(1))"
    done = subprocess.run(
        ["taskset", "-c", str(min(allowed())), sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["1", "1"], done.stderr


def test_nobody_counts_the_machines_processors() -> None:
    """What Python and torch count by themselves may be more than this process gets."""
    root = Path(__file__).resolve().parents[3]
    packages = ("settings", "router", "worker", "prefill_worker", "decode_worker", "kv_transfer", "engine", "deploy",
                "grammar", "simulator", "benchmarks")  # fmt: skip
    found = [
        str(path.relative_to(root))
        for package in packages
        for path in sorted((root / package).rglob("*.py"))
        if "cpu_count" in path.read_text()
    ]
    assert found == ["settings/processors.py", "benchmarks/report.py"]  # the second describes a machine
