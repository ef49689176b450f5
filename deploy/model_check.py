"""Whether a cluster's model can be served, before anything is deployed. No weights are read.

It runs in a process of its own, `python -m deploy.model_check` with the configuration as JSON on standard input: torch
and transformers take seconds and memory that the process of `diptych up` would keep. It runs beside the start of Ray.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

from checkpoint.files import CheckpointError, read_object
from checkpoint.generation import read_description
from checkpoint.quantized import unpacked
from checkpoint.tokenizer import load_tokenizer
from checkpoint.weights import read_weights
from deploy.config import ClusterConfig
from deploy.last_words import useful_line
from settings.model_path import ModelPathError, resolve_model

_CHECK_S = 240.0
_REFUSED = 3  # exit code


class ModelCheckError(Exception):
    """Names cause and fix."""


def check_files(config: ClusterConfig) -> None:
    """What needs neither torch nor transformers: milliseconds. Raises ModelCheckError."""
    from pathlib import Path

    try:
        directory = Path(resolve_model(config.model))
        unpacked(directory, read_object(directory / "config.json"), read_weights(directory))
        read_description(directory)
    except (ModelPathError, CheckpointError) as error:
        raise ModelCheckError(str(error)) from None


def check_model_of(config: ClusterConfig) -> None:
    """As workers and router will load it. Raises ModelCheckError."""
    from engine.model_check import ModelLoadError, check_model

    try:
        asked = set()
        for group in config.groups:
            engine = config.settings_of(group).engine
            if group.replicas:
                asked.add((engine.model, engine.dtype, engine.context_limit_tokens))
        for model, dtype, limit in sorted(asked, key=str):
            check_model(model, dtype, limit)
        load_tokenizer(resolve_model(config.model, weights=False))
    except (ModelLoadError, ModelPathError, CheckpointError) as error:
        raise ModelCheckError(str(error)) from None


class ModelCheck:
    """The process, while it runs."""

    def __init__(self, config: ClusterConfig) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deploy.model_check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said: str | None = None
        self._complaints = ""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(config.model_dump_json())
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdin = None

    def look(self) -> None:
        """`wait`, if it has ended."""
        if self._process.poll() is not None:
            self.wait()

    def wait(self) -> None:
        """Raises ModelCheckError. A check that cannot be made is no refusal: the workers check again."""
        if self._said is None:
            try:
                self._said, self._complaints = self._process.communicate(timeout=_CHECK_S)
            except subprocess.TimeoutExpired:
                return
        if self._process.returncode == _REFUSED:
            raise ModelCheckError(self._said.strip() or useful_line(self._complaints))

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        if self._said is None:
            self._process.communicate()


@contextlib.contextmanager
def checking(config: ClusterConfig) -> Iterator[ModelCheck]:
    check = ModelCheck(config)
    try:
        yield check
    finally:
        check.close()


def main() -> None:
    config = ClusterConfig.model_validate(json.load(sys.stdin))
    try:
        check_model_of(config)
    except ModelCheckError as error:
        print(error)
        sys.exit(_REFUSED)


if __name__ == "__main__":
    main()
