"""Where a model is: a directory, a hub id, or the embedded small model. Whatever it is, it becomes a directory, once,
and everything is read there.

    /models/llama, ./llama, .    a directory; it may also be called `embedded`
    org/name, org/name@revision  of the Hugging Face hub: what of it is not in the local cache is downloaded
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

from settings.cache import cache_directory


class ModelPathError(Exception):
    """Names cause and fix."""


EMBEDDED_MODEL = "embedded"
BROUGHT = "DIPTYCH_EMBEDDED_MODEL"  # environment variable: the directory of the embedded model in an image
_HUB_ID = re.compile(r"([\w.-]+)/([\w.-]+)(?:@([\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LIGHT = ("*.json", "*.jinja", "tokenizer.model", "*.txt")  # no weights
_WEIGHTS = ("*.safetensors",)


def embedded_model_path() -> Path:
    """Where `diptych model` puts the small model, or the image has it."""
    brought = os.environ.get(BROUGHT)
    if brought and os.path.exists(os.path.join(brought, "config.json")):
        return Path(brought)
    return cache_directory() / "models" / "smollm2-135m-instruct"


def resolve_model(model: str, *, weights: bool = True) -> str:
    """The model's directory, an absolute path. `weights`: without them a hub id is fetched in part, for who reads none.

    Raises ModelPathError.
    """
    hub = None if model == EMBEDDED_MODEL or os.path.exists(os.path.expanduser(model)) else _HUB_ID.fullmatch(model)
    if hub is not None and not model.startswith("."):
        return _fetched(hub, weights)
    if model == EMBEDDED_MODEL:
        path = embedded_model_path()
        if not os.path.exists(path / "config.json"):
            raise ModelPathError(f"the embedded model is not at {path}; fetch it with `diptych model`")
        return str(path)
    path = Path(os.path.abspath(os.path.expanduser(model)))
    if not model.strip() or not os.path.exists(path):
        raise ModelPathError(f"there is no model at {model}; name a checkpoint directory, a hub id, or 'embedded'")
    if not os.path.isdir(path):
        raise ModelPathError(f"{path} is a file; name the directory of a transformers checkpoint")
    if os.path.lexists(path / "adapter_config.json"):
        raise ModelPathError(
            f"{path} is the directory of an adapter, not of a model; merge it into its base model and save that"
        )
    if not os.path.lexists(path / "config.json"):
        raise ModelPathError(f"{path} has no config.json; name the directory of a transformers checkpoint")
    return str(path)


def pinned_model(model: str, *, weights: bool = True) -> str:
    """The same model under a word that means the same in every process of a cluster: a path from the root, or a hub id
    with its commit. Raises ModelPathError.
    """
    directory = resolve_model(model, weights=weights)
    if model == EMBEDDED_MODEL or os.path.exists(os.path.expanduser(model)):
        return model if model == EMBEDDED_MODEL else directory
    return f"{model.partition('@')[0]}@{Path(directory).name}"


def model_name(model: str) -> str:
    """What requests call it, unless the configuration names it: the last part of its path or hub id."""
    if model == EMBEDDED_MODEL:
        return embedded_model_path().name
    if not os.path.exists(os.path.expanduser(model)) and (hub := _HUB_ID.fullmatch(model)):
        return hub.group(2)
    path = Path(os.path.abspath(os.path.expanduser(model)))
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):  # of the hub's cache
        return path.parents[1].name.rpartition("--")[2]
    return path.name or "model"  # the root directory has no name


def _fetched(hub: re.Match[str], weights: bool) -> str:
    from huggingface_hub import snapshot_download

    repository, revision = f"{hub.group(1)}/{hub.group(2)}", hub.group(3)
    patterns = [*_LIGHT, *(_WEIGHTS if weights else ())]
    try:
        if revision is not None and _COMMIT.fullmatch(revision):  # it does not change: if it is here, ask nobody
            with contextlib.suppress(Exception):
                found = snapshot_download(repository, revision=revision, local_files_only=True)
                if _is_whole(Path(found), weights):
                    return found
        found = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except Exception as error:  # the library raises many kinds, of its own and of its HTTP client's
        raise ModelPathError(_why_not(repository, revision, error)) from None
    if not os.path.lexists(Path(found) / "config.json"):
        raise ModelPathError(f"{repository} has no config.json; name a transformers checkpoint")
    return found


def _is_whole(directory: Path, weights: bool) -> bool:
    """As far as file names tell."""
    wanted = {"config.json"}
    if weights and not (directory / "model.safetensors").exists():
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        wanted |= set(index["weight_map"].values())
    return all((directory / name).exists() for name in wanted)


def _why_not(repository: str, revision: str | None, error: Exception) -> str:
    kind = type(error).__name__
    shown = repository if revision is None else f"{repository}@{revision}"
    if kind == "GatedRepoError":
        return f"{shown} is gated; accept its terms on the hub and set HF_TOKEN to a token of that account"
    if kind == "RevisionNotFoundError":
        return f"{repository} has no revision {revision}; name a branch, a tag or a commit"
    if kind == "RepositoryNotFoundError":
        return f"the hub has no {repository}, or it is private; correct the name, or set HF_TOKEN"
    if kind in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        return (
            f"there is no directory {shown}, and no model of that hub id in the local cache, and the hub cannot be "
            "reached; name a checkpoint directory, or fetch the model where there is a network"
        )
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), kind)[:200]
    return f"{shown} cannot be fetched from the hub ({kind}: {said}); correct the name, or name a checkpoint directory"
