"""Why a model is not served."""

from __future__ import annotations

from checkpoint.files import first_line


class ModelLoadError(Exception):
    """The model cannot be served; the message names cause and fix."""


class AdapterError(ModelLoadError):
    """An adapter cannot be served; the message names cause and fix. In a step: it cannot be loaded any more."""


def meant_for_people(error: BaseException) -> str:
    """` (what it says)` of an error that says what is asked of a user, or that memory is short; "" of a fault inside
    somebody's code, which the log has.
    """
    told = isinstance(error, ValueError | ImportError | MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return f" ({first_line(error)})" if told else ""


class RankLost(Exception):
    """A process of a worker of several ranks is gone, or does not keep step: the worker must end. The message names it
    and the cause.
    """
