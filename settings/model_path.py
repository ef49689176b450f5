"""Where a model is: a directory, a hub id, or the embedded small model."""

from __future__ import annotations

import os
from pathlib import Path


class ModelPathError(Exception):
    """Names cause and fix."""


EMBEDDED_MODEL = "embedded"


def cache_directory() -> Path:
    """What can be made again: $DIPTYCH_HOME, else a directory of the user's cache."""
    home = os.environ.get("DIPTYCH_HOME")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych"


def embedded_model_path() -> Path:
    """Where `diptych model` puts the small model."""
    return cache_directory() / "models" / "smollm2-135m-instruct"


def resolve_model(model: str) -> str:
    """A directory or a hub id. Raises ModelPathError for a path that cannot be one."""
    if model == EMBEDDED_MODEL:
        path = embedded_model_path()
        if not (path / "config.json").exists():
            raise ModelPathError(f"the embedded model is not at {path}; fetch it with `diptych model`")
        return str(path)
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "config.json").exists():
            raise ModelPathError(f"{path} has no config.json; name the directory of a transformers checkpoint")
        return str(path)
    if model.startswith(("/", "./", "../", "~")) or model.count("/") != 1:
        raise ModelPathError(f"there is no model at {model}; name a checkpoint directory, a hub id, or 'embedded'")
    return model
