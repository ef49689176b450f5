"""What a process started is found and ended, whoever is its parent by then."""

from __future__ import annotations

import subprocess
import sys
import time

from settings.children import descendants, end

_PATIENT = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"


def test_a_tree_is_ended_also_when_its_root_left_first_or_does_not_heed() -> None:
    before = descendants()
    shell = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60 & wait"])
    patient = subprocess.Popen([sys.executable, "-c", _PATIENT], stdout=subprocess.PIPE)
    assert patient.stdout is not None
    patient.stdout.readline()
    deadline = time.monotonic() + 10
    while len(descendants() - before) < 4:
        assert time.monotonic() < deadline
    ours = descendants() - before
    shell.kill()
    shell.wait()
    end(ours, 0.2)
    assert patient.wait(5) == -9
    patient.stdout.close()
    assert not descendants() - before


def test_nobody_is_no_trouble() -> None:
    end((), 10.0)
    end({2**30}, 10.0)
