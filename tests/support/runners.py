"""Runners that a machine may refuse for a reason that is no fault of ours."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import EngineConfig
from engine.model_loader import ModelLoadError
from engine.runner import ModelRunner


def started(settings: dict[str, Any]) -> ModelRunner:
    """Batch-invariant mode in torch rests on torch's libraries; where they are not, it must say so at start."""
    try:
        return ModelRunner(EngineConfig.model_validate(settings))
    except ModelLoadError as error:
        if settings.get("batch_invariant") and str(error).startswith("torch is not batch-invariant on this machine"):
            pytest.skip(str(error))
        raise
