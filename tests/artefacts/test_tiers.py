"""What tests/support/tiers.py asks of every test, shown on small suites of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiers import default_ports, group_of, in_turns

ROOT = Path(__file__).resolve().parents[2]


def pytest_on(directory: Path, files: dict[str, str], *arguments: str) -> str:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    (directory / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.tiers", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [*command, *arguments, "tests"],
        cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=90,
        check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_a_test_that_leaves_a_process_fails(tmp_path: Path) -> None:
    text = """
import subprocess, pytest
SLEEP = ["sleep", "20"]

@pytest.fixture(scope="module")
def long_lived():
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()

def test_clean(long_lived):
    subprocess.run(["true"], check=True)

def test_untidy(long_lived, record_property):
    global left
    left = subprocess.Popen(SLEEP)

def test_after():
    left.kill()
    left.wait()
"""
    said = pytest_on(tmp_path, {"tests/unit/test_small.py": text})
    assert "3 passed, 1 error" in said, said
    assert re.search(r"the test left processes running.*\d+: sleep 20", said)


def test_a_test_that_takes_a_default_port_fails(tmp_path: Path) -> None:
    """Alone it would pass, and fail on the day that another such test runs beside it. Pods have their own addresses."""
    text = """
import socket, pytest
@pytest.mark.parametrize("address", ["127.0.0.1", "", "::", "127.189.1.2"])
def test_it(address):
    both = ":" in address
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server((address, {port}), family=family, dualstack_ipv6=both):
        pass
"""
    ports = default_ports()
    assert len(ports) == 4
    files = {f"tests/http/test_{port}.py": text.format(port=port) for port in ports}
    for side_by_side in ((), ("-n", "2", "--dist", "loadscope")):
        said = pytest_on(tmp_path, files, *side_by_side)
        assert "12 failed, 4 passed" in said, said
        assert "Address already in use" in said


def test_a_group_may_take_single_tests_of_a_file_whose_others_are_apart() -> None:
    file = "tests/cluster/test_commands.py::test_up_generate_status_bench_and_a_clean_stop"
    assert group_of(f"{file}[True]") == "one Ray after the other" == group_of("tests/cluster/test_pod_end.py::test_x")
    assert group_of(f"{file}[False]") == f"{file}[False]".removeprefix("tests/")


def test_a_test_that_ends_its_process_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What that process had run and what it had not run: every other test runs once, and the run ends."""
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    some = """
import os, pytest
@pytest.mark.parametrize("n", range(4))
def test_it(n):
    with open(os.environ["RAN"], "a", 1) as ran:
        ran.write(f"{__name__} {n}\\n")
"""
    files = {f"tests/{folder}/test_{folder}_{i}.py": some for folder in ("http", "model", "unit") for i in range(4)}
    ends = "def test_ends():\n    os._exit(4)\n"
    files["tests/model/test_model_1.py"] = some.replace("@pytest", ends + "@pytest")
    files["tests/unit/test_unit_3.py"] = some + ends
    said = pytest_on(tmp_path, files, "-n", "3", "--dist", "loadscope", "--no-loadscope-reorder")
    assert "2 failed, 48 passed" in said, said
    ran = (tmp_path / "ran").read_text().splitlines()
    assert len(ran) == len(set(ran)) == 48


def test_a_unit_test_that_computes_for_long_fails(tmp_path: Path) -> None:
    text = """
import time

def test_computes():
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass

def test_waits():
    time.sleep(0.3)
"""
    assert "2 passed" in pytest_on(tmp_path, {"tests/unit/test_small.py": text})
    said = pytest_on(tmp_path, {"tests/unit/test_small.py": text}, "--unit-limit", "0.2")
    assert "1 failed, 1 passed" in said, said
    assert "s of processor time; a unit test has 0.2 s: make it smaller or move it" in said


SHARED = """
import os, pytest

@pytest.fixture(scope="session")
def shared():
    with open(os.environ["MADE"], "a", 1) as made:
        made.write("once\\n")
        yield
        made.write("gone\\n")
"""
USED = "import pytest\n@pytest.mark.parametrize('n', range(5))\ndef test_it(shared, n):\n    pass\n"


def test_tests_that_share_a_costly_fixture_run_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADE", str(tmp_path / "made"))
    files = {"tests/http/conftest.py": SHARED, "tests/http/test_a.py": USED, "tests/http/test_b.py": USED}
    said = pytest_on(tmp_path, files, "-n", "2", "--dist", "loadscope")
    assert "10 passed" in said, said
    assert (tmp_path / "made").read_text() == "once\ngone\n"


def test_what_a_group_shares_ends_with_its_last_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whose files others are in the middle."""
    monkeypatch.setenv("MADE", str(tmp_path / "made"))
    after = "import os\ndef test_it():\n    assert open(os.environ['MADE']).read() == 'once\\ngone\\n'\n"
    files = {
        "tests/conftest.py": SHARED,
        "tests/clients/test_a.py": USED,
        "tests/cluster/test_b.py": after,
        "tests/ui/test_c.py": USED,
    }
    said = pytest_on(tmp_path, files)
    assert "11 passed" in said, said


def test_a_costly_fixture_of_two_groups_is_refused(tmp_path: Path) -> None:
    said = pytest_on(tmp_path, {"tests/conftest.py": SHARED, "tests/test_a.py": USED, "tests/test_b.py": USED})
    assert "add to TOGETHER in tests/support/tiers.py those that share a fixture" in said
    assert "['test_a.py', 'test_b.py']" in said


def test_what_waits_and_what_computes_take_turns() -> None:
    tests = [
        "tests/cluster/test_a.py::one", "tests/cluster/test_b.py::one", "tests/cluster/test_b.py::two",
        "tests/model/test_c.py::one", "tests/model/test_d.py::one", "tests/model/test_e.py::one",
        "tests/model/test_f.py::one", "tests/unit/test_g.py::one", "tests/http/test_h.py::one",
    ]  # fmt: skip
    assert in_turns(tests) == [
        "model/test_c.py", "cluster/test_a.py", "model/test_d.py", "cluster/test_b.py", "model/test_e.py",
        "model/test_f.py", "a router over HTTP", "unit/test_g.py",
    ]  # fmt: skip


@pytest.mark.parametrize("target", ["test", "test-long"])
def test_the_tiers_are_told_apart_by_one_mark(target: str) -> None:
    """What one leaves out the other runs; nothing is skipped for being long."""
    recipe = re.search(rf"^{target}: setup\n(?:\t.*\n)*", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    marks = {"test": ["not long"], "test-long": ["long and not ray", "long and ray"]}[target]
    assert re.findall(r'(?:\$\(PYTEST\)|python -m pytest) -m "([^"]+)" \$\(ARGS\)', recipe[0]) == marks
