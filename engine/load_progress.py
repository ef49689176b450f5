"""How far the weights of a model have been read, while transformers reads them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

_EVERY_S = 5.0


class Counted:
    """What transformers goes through instead of the bar that it would draw. Small models say nothing."""

    def __init__(self, things: Any, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._things, self._tell, self._clock = things, tell, clock

    def __iter__(self) -> Iterator[Any]:
        total, told = len(self._things), self._clock()
        for done, thing in enumerate(self._things):
            if (now := self._clock()) - told >= _EVERY_S:
                told = now
                self._tell(f"{100 * done // total} %")
            yield thing


@contextlib.contextmanager
def weights_told(tell: Callable[[str], None]) -> Iterator[None]:
    """`tell` hears of every few seconds."""
    from transformers.utils import logging as theirs

    set_hook = getattr(theirs, "set_tqdm_hook", None)
    if set_hook is None:  # an older release
        yield
        return

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        counts = options.get("desc") == "Loading weights" and args and hasattr(args[0], "__len__")
        return Counted(args[0], tell) if counts else factory(*args, **options)

    before = set_hook(hook)
    try:
        yield
    finally:
        set_hook(before)
