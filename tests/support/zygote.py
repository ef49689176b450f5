"""Processes of a cluster without the seconds in which each of them imports torch: forked from one that has.

    test process --(module, settings file, log, environment)--> zygote, which has one thread and has started nothing
                                                                 forks twice: the process's parent ends at once,
    test process <------------------ adopts ------------------   so that it becomes the test process's own child

The process then does what `python -m module --config FILE` does, in a session of its own. What is different: its
command line is the zygote's, and modules that read the environment when they are imported have read the zygote's.
Tests of either begin processes as users do, and so do benchmarks.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.processes import Processes

_PRELOADED = (
    "elastic_worker.server",
    "router.server",
    "worker.main",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.integrations.flash_attention",
    "transformers.integrations.finegrained_fp8",
    "torch._dynamo",
    "torch._subclasses.fake_tensor",
    "torch.distributed.tensor",
)
PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Adopted(subprocess.Popen[bytes]):
    """A child that another process has begun."""

    def __init__(self, args: list[str], pid: int) -> None:
        self.args, self.pid, self.returncode = args, pid, None
        self.stdin = self.stdout = self.stderr = None
        self._child_created = True
        self._waitpid_lock = threading.Lock()


class Zygote:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self._process.kill)

    def fork(self, module: str, settings: Path, log: Path, environment: Mapping[str, str]) -> Adopted:
        wanted = {"module": module, "settings": str(settings), "log": str(log), "environment": dict(environment)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            adopt_orphans(True)  # no longer than for this one
            try:
                self._process.stdin.write(json.dumps(wanted) + "\n")
                self._process.stdin.flush()
                pid, parent_is_gone = self._process.stdout.readline(), self._process.stdout.readline()
            finally:
                adopt_orphans(False)
        assert parent_is_gone, "the zygote has ended"
        return Adopted([sys.executable, "-m", module, "--config", str(settings)], int(pid))


def adopt_orphans(wanted: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


_zygote: list[Zygote] = []


class ForkedProcesses(Processes):
    def _begin(self, module: str, settings: Path, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        if not _zygote:
            _zygote.append(Zygote())
        return _zygote[0].fork(module, settings, log, environment)


# In the zygote.


def main() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        assert len(os.listdir("/proc/self/task")) == 1, "a thread would not be in the fork, and what it holds would"
        parent = os.fork()
        if not parent:
            pid = os.fork()
            if not pid:
                become(json.loads(line))
            os.write(1, f"{pid}\n".encode())
            os._exit(0)
        os.waitpid(parent, 0)
        os.write(1, b"gone\n")


def become(wanted: Mapping[str, Any]) -> None:
    """Does not return."""
    code: Any = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for given, fd in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(given, fd)
        os.environ.clear()
        os.environ.update(wanted["environment"])
        sys.argv = [wanted["module"], "--config", wanted["settings"]]
        runpy.run_module(wanted["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main()
