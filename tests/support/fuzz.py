"""How long the fuzz tests search: a fixed, repeatable sample by default, fresh and longer ones with FUZZ=long."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_CHECKS = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture)
settings.register_profile("fuzz-ci", deadline=None, derandomize=True, suppress_health_check=_CHECKS)
settings.register_profile("fuzz-long", deadline=None, print_blob=True, suppress_health_check=_CHECKS)

LONG = os.environ.get("FUZZ") == "long"
_LONGER = 30


def examples(count: int) -> settings:
    """Of one test, in the default run."""
    profile = settings.get_profile("fuzz-long" if LONG else "fuzz-ci")
    return settings(profile, max_examples=count * _LONGER if LONG else count)
