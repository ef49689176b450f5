"""How many processors this process may use: not those of the machine, but what affinity (taskset, a cpuset) and the
quota of its control groups leave of them. More threads than that only wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# What a worker starts with. One OpenMP thread until the engine says how many; and those that have nothing to do sleep
# soon: by default libgomp's wait in a loop for milliseconds, on processors that the native kernels' threads could have.
THREAD_VARIABLES = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}

_PROC, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def allowed() -> tuple[int, ...]:
    """Their numbers, by affinity; none where the system does not tell."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def usable() -> int:
    """At least one."""
    by_affinity = len(allowed()) or os.cpu_count() or 1
    quota = cpu_quota()
    return by_affinity if quota is None else max(1, min(by_affinity, int(quota)))


def cpu_quota(proc: Path = _PROC, groups: Path = _GROUPS) -> float | None:
    """Processors' worth of time that the control groups allow, the tightest on the way up; None: no limit."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None  # no Linux
    quotas = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2, the whole machine's or beside version 1
            for root in (groups, groups / "unified"):
                quotas += [_quota(d / "cpu.max") for d in _upwards(root, path)]
        elif "cpu" in controllers.split(","):
            for name in {controllers, "cpu"}:
                quotas += [
                    _quota(d / "cpu.cfs_quota_us", d / "cpu.cfs_period_us") for d in _upwards(groups / name, path)
                ]
    return min((q for q in quotas if q is not None), default=None)


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """A group's directory and those above it. In a container its path may be the host's: the root is looked at then."""
    group = root / path.lstrip("/")
    while group != root and root in group.parents:
        yield group
        group = group.parent
    yield root


def _quota(*files: Path) -> float | None:
    """Of "max 100000" or "150000 100000", in one file or two."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if quota not in ("max", "-1") and int(period) > 0 else None
    except (OSError, ValueError):
        return None
