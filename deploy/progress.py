"""What `diptych up` tells while it starts a cluster: each stage when it begins, what is waited for while it lasts, and
how long it took. Nothing that is told is read as markup.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.status import Status
from rich.text import Text

_AGAIN_S = 5.0  # a line about the same stage, where lines cannot be overwritten


class Stages:
    """Called with a stage's name when it begins; `ending` when only the end is left; `done` at last.

    `each`: called with every stage and note. `at_end`: called before whatever must not be broken off any more.
    """

    def __init__(
        self,
        console: Console,
        each: Callable[[], object] = lambda: None,
        at_end: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._each, self._at_end = each, at_end
        self._clock = clock
        self._what = ""
        self._begun = 0.0
        self._status: Status | None = None
        self._said, self._said_at = "", 0.0

    def __call__(self, what: str) -> None:
        self._each()
        self.done()
        self._what, self._begun = what, self._clock()
        self._said, self._said_at = "", self._begun
        if self._console.is_terminal:
            self._status = self._console.status(Text(what, style="dim"))
            self._status.start()
        else:
            self._print(f"{what} ...")

    def note(self, text: str) -> None:
        """To be read now, whatever becomes of the stage."""
        self._each()
        self._print(text)

    def ending(self, what: str) -> None:
        self._at_end()
        self(what)

    def waiting(self, what: str) -> None:
        """As often as one likes."""
        if self._status is not None:
            self._status.update(Text(f"{self._what}: {what}", style="dim"))
        elif what != self._said and self._clock() - self._said_at >= _AGAIN_S:
            self._said, self._said_at = what, self._clock()
            self._print(f"{what} ({self._clock() - self._begun:.0f} s)")

    def done(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._what:
            self._print(f"{self._what} ({self._clock() - self._begun:.1f} s)")
            self._what = ""

    def _print(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)
