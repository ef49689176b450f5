"""Why a model is not served."""

from __future__ import annotations


class ModelLoadError(Exception):
    """The model cannot be served; the message names cause and fix."""
