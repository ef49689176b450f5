"""`reasoning_effort` and `reasoning`: a model reasons as its template has it, so the effort is a variable of that."""

from __future__ import annotations

from typing import Any

from router.doors.http.errors import invalid
from router.doors.http.parse import Body

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Reasoning(Body):
    """Of /v1/responses. There are no summaries: none is made of what a model writes."""

    effort: str | None = None
    summary: Any = None
    generate_summary: Any = None
    context: Any = None
    mode: str | None = None


def reasoning_effort(reasoning: Reasoning | None) -> str | None:
    """Raises ApiError."""
    if reasoning is None:
        return None
    if reasoning.mode not in (None, "standard"):
        raise invalid("reasoning.mode", f"reasoning.mode {reasoning.mode[:100]!r} is not supported; leave it out")
    return reasoning.effort


def template_variables(effort: str | None, param: str, template: str) -> dict[str, Any]:
    """What a chat template is told. Raises ApiError for an effort that this one knows nothing of."""
    if effort is None:
        return {}
    if effort not in _EFFORTS:
        raise invalid(param, f"{param} {effort[:100]!r} does not exist; use {', '.join(_EFFORTS)}")
    if effort != "none" and "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    if "enable_thinking" in template:
        return {"enable_thinking": effort != "none"}
    if effort == "none":
        return {}
    raise invalid(
        param, f"{param} is not supported: this model's template knows no effort; leave it out", "unsupported_parameter"
    )
