"""A cluster of plain processes on this machine, without Ray: `diptych up --no-ray`, and the tests.

Every process gets a settings file and a log file in one directory. `stop` leaves no process behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deploy.last_words import useful_line
from settings.phases import FILE_VARIABLE, read_phase
from settings.process import LAST_WORDS

_MAX_WORDS = 2000
_MAX_LOG = 64 << 10


class Processes:
    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.environment = dict(environment or {})
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def spawn(self, name: str, module: str, settings: Mapping[str, Any]) -> None:
        """`python -m module --config <name>.yaml`, its output in <name>.log."""
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(dict(settings)))
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            LAST_WORDS: str(self.directory / f"{name}.words"),
            FILE_VARIABLE: str(self._phase_file(name)),
            **self.environment,
        }
        self.running[name] = self._begin(module, path, self.directory / f"{name}.log", environment)

    def _begin(self, module: str, settings: Path, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", module, "--config", str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C at the terminal is ours to pass on, in order
            )

    def phases(self) -> dict[str, str]:
        """What each is doing until it serves."""
        return {name: read_phase(self._phase_file(name)) for name in self.running}

    def _phase_file(self, name: str) -> Path:
        return self.directory / f"{name}.phase"

    def ended(self) -> dict[str, int]:
        """Exit codes of processes that are gone without having been asked."""
        codes = {name: process.poll() for name, process in self.running.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def stop(self, timeout_s: float, last: str = "router") -> list[str]:
        """SIGTERM to all, `last` and its like ("router-1") after the others. Returns who had to be killed."""
        stuck = []
        deadline = time.monotonic() + timeout_s
        in_the_end = [n for n in self.running if n == last or n.startswith(f"{last}-")]
        for names in ([n for n in self.running if n not in in_the_end], in_the_end):
            for name in names:
                self.running[name].send_signal(signal.SIGTERM)
            for name in names:
                try:
                    self.running[name].wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    self.running[name].send_signal(signal.SIGUSR1)  # its stacks, into its log
                    time.sleep(0.5)
                    self.running[name].kill()
                    self.running[name].wait()
                    stuck.append(name)
        self.running.clear()
        return stuck

    def last_words(self, name: str) -> str:
        """Why a process could not start, in its own words; else the line of its log that tells most."""
        words, log = self.directory / f"{name}.words", self.directory / f"{name}.log"
        if words.exists():
            return words.read_text(errors="replace").strip()[-_MAX_WORDS:]
        return useful_line(log.read_text(errors="replace")[-_MAX_LOG:] if log.exists() else "") or "no output"

    def logs(self, tail: int = 3000) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-tail:]}"
            for path in sorted(self.directory.glob("*.log"))
        )
