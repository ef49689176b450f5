"""vLLM's process sees nothing of ours and nothing of an earlier run, and says why it ended. vLLM itself is played."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.children import ChildEnded
from benchmarks.vllm_process import Vllm

# As its model inspection does: a `python -m` of its own, which looks for modules in the working directory first.
PLAYED = """
import importlib.util, os, subprocess, sys, types
__version__ = "0"
SamplingParams = lambda **_: None
class LLM:
    def __init__(self, model, **_):
        if model == "too large":
            print("no room for the KV cache", file=sys.stderr)
            sys.exit(9)
        assert os.listdir() == os.listdir(os.environ["HOME"]) == [], "not empty"
        assert importlib.util.find_spec("kernels") is None, "benchmarks/ is searched for modules"
        inner = subprocess.run([sys.executable, "-m", "kernels"], capture_output=True, text=True)
        assert "No module named kernels" in inner.stderr, inner.stderr
        assert "XDG_CACHE_HOME" not in os.environ
        open(os.path.join(os.environ["HOME"], "cache"), "w").close()
    def generate(self, prompts, sampling, use_tqdm):
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[1, 2])]) for _ in prompts]
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An interpreter in whose environment the played vLLM is installed."""
    (tmp_path / "vllm.py").write_text(PLAYED)
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexport PYTHONPATH={tmp_path}\nexec {sys.executable} -S "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return str(wrapper)


@pytest.mark.parametrize("run", ["first", "second"])
def test_it_starts_in_an_empty_directory_with_an_empty_home(python: str, run: str) -> None:
    vllm = Vllm(python, "a model", "float32", 1)
    try:
        vllm.wait()
        assert vllm.version == "0"
        assert vllm.run([[5, 6], [7]], 2) >= 0.0
    finally:
        vllm.stop()


def test_what_it_said_when_it_ended_is_in_the_message(python: str) -> None:
    vllm = Vllm(python, "too large", "float32", 1)
    with pytest.raises(ChildEnded, match=r"(?s)vllm ended with exit code 9; .*no room for the KV cache"):
        vllm.wait()
    vllm.stop()
