"""vLLM's CPU build, compiled, in its own environment and processes (benchmarks/vllm_child.py)."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.children import Child

_START_S = 600.0  # it compiles; 60 s on a quiet machine
_RUN_S = 120.0
# What could show it something of ours, or of an earlier run.
_LEFT_OUT = ("PYTHON", "VIRTUAL_ENV", "XDG_", "HF_", "VLLM_", "TORCH", "TRITON", "OMP_", "KMP_")


class Vllm:
    """Everything that it caches is new each time: a cache of an earlier run hid that it could not start."""

    name = "vllm cpu, compiled"

    def __init__(self, python: str, path: str, dtype: str, threads: int) -> None:
        """Starts it, and returns at once; `wait` before the first run. Raises OSError."""
        root = Path(tempfile.mkdtemp(prefix="vllm-"))
        home, work, scratch = self._scratch = root / "home", root / "work", root / "tmp"
        for directory in self._scratch:
            directory.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_LEFT_OUT)}
        bins = [b for b in os.environ.get("PATH", os.defpath).split(os.pathsep) if Path(b) != Path(sys.prefix) / "bin"]
        environment["PATH"] = os.pathsep.join([str(Path(python).parent), *bins])
        environment |= {"HOME": str(home), "TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
        # -P for itself, an empty working directory for each `python -m` that it starts: both look for modules there
        command = [python, "-P", str(Path(__file__).with_name("vllm_child.py")), path, dtype, str(threads)]
        self._child = Child("vllm", command, root, environment=environment, cwd=work, talks=True, own_session=True)
        self.session = self._child.pid
        self.version = ""

    def wait(self) -> None:
        self.version = self._answer(_START_S)["version"]

    def run(self, batch: list[list[int]], new_tokens: int) -> float:
        self._child.ask(json.dumps({"prompts": batch, "new_tokens": new_tokens}))
        return self._answer(_RUN_S)["seconds"]

    def stop(self) -> None:
        """Its log stays where somebody was told of it."""
        self._child.stop()
        for directory in self._scratch:
            shutil.rmtree(directory, ignore_errors=True)
        if not self._child.failed:
            shutil.rmtree(self._child.log.parent, ignore_errors=True)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        return json.loads(self._child.answer(timeout_s))
