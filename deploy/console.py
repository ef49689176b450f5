"""What the command line writes on. Text is text: nothing is read as markup, whoever wrote it (paths, prompts, names of
models and workers, what a router answered); style is given beside it.
"""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from settings.versions import OURS

out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


def say_error(message: object) -> None:
    err.print(Text.assemble(("error:", "red"), f" {message}"), soft_wrap=True)


def fail(message: str) -> NoReturn:
    say_error(message)
    raise typer.Exit(1)


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        out.print(f"diptych {version('diptych')}, protocol {OURS.version} (understands {OURS.oldest})")
        raise typer.Exit


VERSION = typer.Option("--version", callback=_say_version, is_eager=True, help="The release, and its protocol.")
