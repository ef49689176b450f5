"""What `make test-anywhere` names is there."""

from __future__ import annotations

from engine.native.build import ISA_VARIABLE, LEVELS
from tests.support.anywhere import MACHINES, ROOT, SUBSET, command


def test_what_it_runs_exists() -> None:
    assert [path for path in SUBSET if not (ROOT / path).exists()] == []
    for machine in MACHINES.values():
        assert machine.needs in LEVELS
        assert machine.variables.get(ISA_VARIABLE, LEVELS[0]) in LEVELS


def test_one_processor_is_one_that_this_process_may_use() -> None:
    (only,) = (m for m in MACHINES.values() if m.one_processor)
    assert command(only, ["x"])[:2] == ["taskset", "-c"]
    assert command(MACHINES["avx2"], ["x"])[1:3] == ["-m", "pytest"]
