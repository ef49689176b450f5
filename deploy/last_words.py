"""What of a log or a traceback tells a person why something ended: one line, the first that names the cause."""

from __future__ import annotations

import re

_MAX_CHARS = 600
_TRACEBACK = "Traceback (most recent call last):"
_LEVEL = re.compile(r"\b(CRITICAL|ERROR)\b")
_FRAME = re.compile(r"^\s*(File |\^|~|\[Previous line|During handling|The above exception)")
_RAISED = re.compile(r"^\s*(?:\w+\.)*(\w+(?:Error|Exception|Unavailable|Stalled|Failed)): (.*)$")
_OURS = {"ModelLoadError", "RouterStartError", "WorkerStartError", "NixlUnavailable", "SettingsError"}


def useful_line(text: str) -> str:
    """Of a traceback: the line that says what was raised, ours before a library's, without its class if it is ours.
    Else the first error of a log, else its last line. Empty for nothing.
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    raised = [found for line in lines if not _FRAME.match(line) and (found := _RAISED.match(line))]
    ours = [found for found in raised if found.group(1) in _OURS]
    if ours:
        return ours[0].group(2).strip()[:_MAX_CHARS]
    if raised and any(_TRACEBACK in line for line in lines):
        return raised[-1].group(0).strip()[:_MAX_CHARS]
    errors = [line for line in lines if _LEVEL.search(line)]
    return (errors or lines[-1:] or [""])[0].strip()[:_MAX_CHARS]
