"""What groups of workers must have in common to hand KV to each other."""

from __future__ import annotations

from collections.abc import Collection

from deploy.config import ClusterConfig
from deploy.pools import Home, role_of
from engine.config import EngineConfig

_KEYS = ("model", "dtype", "block_tokens", "batch_invariant", "kv_dtype")


def started(config: ClusterConfig) -> set[Home]:
    """Groups that the configuration has workers of."""
    return {group.home for group in config.groups if group.replicas}


def cannot_share_kv(config: ClusterConfig, homes: Collection[Home]) -> str | None:
    """Why workers of these groups could not hand over, with the fix; None: they can. Raises SettingsError for an
    override that does not fit.
    """
    engines = {group.home: config.settings_of(group).engine for group in config.groups if group.home in homes}
    if not engines:
        return None
    first = next((home for home in engines if role_of(home) == "decode"), next(iter(engines)))
    for home, engine in engines.items():
        problem = _differ(home, engine, first, engines[first], mixed=config.router.mixed_quantization)
        if problem:
            return problem
    several = [home for home, engine in engines.items() if engine.tensor_parallel > 1]
    if several and config.transport.digest:
        return (
            f"transport.digest is of whole blocks, and the ranks of {several[0]} workers hold parts of them: set "
            "transport.digest to false, or engine.tensor_parallel to 1"
        )
    return None


def _differ(home: Home, ours: EngineConfig, first: Home, theirs: EngineConfig, *, mixed: bool) -> str | None:
    scheme = ("quantization", "quantized_groups") if theirs.quantization != "none" else ("quantization",)
    for key in _KEYS if mixed else (*_KEYS, *scheme):  # groups without quantization say nothing
        if getattr(ours, key) != getattr(theirs, key):
            fix = ", or set router.mixed_quantization to true (docs/quantization.md)" if key in scheme else ""
            return (
                f"engine.{key} is {getattr(ours, key)} for {home} and {getattr(theirs, key)} for {first}: they could "
                f"not share KV; use one for both{fix}"
            )
    return None
