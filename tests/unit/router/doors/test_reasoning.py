"""An effort becomes what the model's template knows, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from router.doors.http.errors import ApiError
from router.doors.http.reasoning import template_variables


@pytest.mark.parametrize(
    ("template", "effort", "variables"),
    [
        ("", None, {}),
        ("", "none", {}),
        ("{{ reasoning_effort }}", "low", {"reasoning_effort": "low"}),
        ("{{ reasoning_effort }}", "none", {}),
        ("{{ enable_thinking }}", "high", {"enable_thinking": True}),
        ("{{ enable_thinking }}", "none", {"enable_thinking": False}),
        ("{{ enable_thinking }} {{ reasoning_effort }}", "none", {"enable_thinking": False}),
    ],
)
def test_an_effort_is_a_variable_of_the_template(template: str, effort: str | None, variables: dict[str, Any]) -> None:
    assert template_variables(effort, "reasoning_effort", template) == variables


def test_an_effort_that_the_template_does_not_know_is_refused() -> None:
    with pytest.raises(ApiError, match="knows no effort"):
        template_variables("low", "reasoning_effort", "{{ messages }}")
