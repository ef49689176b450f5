"""What config.json and generation_config.json say of answers: their end, their sampling, their length.

A request that leaves a sampling parameter out gets the model's own, as in vLLM: temperature, top_p, top_k, min_p and
repetition_penalty are defaults, max_new_tokens is a limit for every request. `do_sample` is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.files import CheckpointError, read_object, read_optional
from checkpoint.limits import context_limit
from settings.sampling import RANGES

_MAX_TOKEN_ID = 1 << 31


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """None where the model's author left it open."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def __str__(self) -> str:
        said = ((name, getattr(self, name)) for name in self.__slots__)
        return ", ".join(f"{name} {value:g}" for name, value in said if value is not None)


@dataclass(frozen=True, slots=True)
class Described:
    """What a router and a grammar need to know of a model, without its weights."""

    vocab_size: int | None
    context_limit_tokens: int | None
    end_tokens: frozenset[int]
    sampling: SamplingDefaults


def read_description(directory: str | Path) -> Described:
    """Raises CheckpointError."""
    path, generation_path = Path(directory) / "config.json", Path(directory) / "generation_config.json"
    config = read_object(path)
    text = config.get("text_config")
    text = {**config, **text} if isinstance(text, Mapping) else config
    generation = read_optional(generation_path)
    where, stated = (generation_path, generation) if "eos_token_id" in generation else (path, text)
    vocabulary = text.get("vocab_size")
    if vocabulary is not None and not (_is_whole(vocabulary) and 0 < vocabulary <= _MAX_TOKEN_ID):
        raise _bad(path, "vocab_size", vocabulary, "a number of tokens")
    return Described(
        vocabulary,
        context_limit(config),
        _end_tokens(where, stated.get("eos_token_id")),
        _sampling(generation_path, generation),
    )


def _end_tokens(path: Path, stated: Any) -> frozenset[int]:
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    for token in ids:
        if not _is_whole(token) or not 0 <= token < _MAX_TOKEN_ID:
            raise _bad(path, "eos_token_id", token, "token ids")
    return frozenset(ids)


# Name in the file, what a value must be, and how that is said.
_LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("temperature", lambda v: _is_number(v) and v in RANGES["temperature"], str(RANGES["temperature"])),
    ("top_p", lambda v: _is_number(v) and v in RANGES["top_p"], str(RANGES["top_p"])),
    ("top_k", lambda v: _is_whole(v) and (v == -1 or v in RANGES["top_k"]), str(RANGES["top_k"])),
    ("min_p", lambda v: _is_number(v) and v in RANGES["min_p"], str(RANGES["min_p"])),
    (
        "repetition_penalty",
        lambda v: _is_number(v) and v in RANGES["repetition_penalty"],
        str(RANGES["repetition_penalty"]),
    ),
    ("max_new_tokens", lambda v: _is_whole(v) and v >= 1, "a whole number >= 1"),
)


def _sampling(path: Path, stated: Mapping[str, Any]) -> SamplingDefaults:
    found: dict[str, Any] = {}
    for name, fits, wanted in _LIMITS:
        value = stated.get(name)
        if value is None:
            continue
        if not fits(value):
            raise _bad(path, name, value, f"{wanted}, or set router.generation_config to ours")
        found["max_tokens" if name == "max_new_tokens" else name] = max(value, 0)
    return SamplingDefaults(**found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e30


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad(path: Path, name: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"{path} has {name} {str(value)[:60]!r}; correct it to {wanted}")
