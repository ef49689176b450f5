"""The command line shows text as it is, whoever wrote it."""

from __future__ import annotations

import importlib
import io
import pkgutil
from pathlib import Path

import pytest
import typer
from diptych.v1 import cluster_pb2
from rich.console import Console
from typer.testing import CliRunner

import deploy
import deploy.console
from deploy.cli import app
from deploy.status_view import render

NASTY = "[red]/models/[a]/[/b][link=file:///etc] :smile: \\[x]"


def test_no_console_of_ours_reads_markup() -> None:
    found = 0
    for module in pkgutil.iter_modules(deploy.__path__, "deploy."):
        if module.name in ("deploy.app", "deploy.directory"):
            continue  # import Ray, and write nothing
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Console):
                assert not value._markup, module.name
                assert not value._emoji, module.name
                found += 1
    assert found
    root = Path(deploy.__path__[0])
    assert [p.name for p in sorted(root.glob("*.py")) if "Console(" in p.read_text()] == ["console.py"]


def test_an_error_is_shown_letter_by_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Console(file=io.StringIO(), markup=False, emoji=False, highlight=False)
    monkeypatch.setattr(deploy.console, "err", said)
    with pytest.raises(typer.Exit):
        deploy.console.fail(f"there is no model at {NASTY}")
    assert isinstance(said.file, io.StringIO)
    assert said.file.getvalue() == f"error: there is no model at {NASTY}\n"


def test_a_path_with_brackets_is_no_markup_and_no_traceback() -> None:
    done = CliRunner().invoke(app, ["up", "--model", "/no/[red]a/[/b]"])
    assert done.exit_code == 1
    assert not isinstance(done.exception, Exception) or isinstance(done.exception, SystemExit)
    assert "/no/[red]a/[/b]" in done.output


def test_names_from_a_cluster_are_no_markup() -> None:
    worker = cluster_pb2.Worker(worker_id="[bold]w[/bold][/x]", device="[d]", transport=":smile:")
    cluster = cluster_pb2.Cluster(workers=[worker], router=cluster_pb2.RouterState(router_id="[r]", model="[/m]"))
    file = io.StringIO()
    Console(file=file, width=160, markup=False, emoji=False, highlight=False).print(render(cluster))
    for text in ("[bold]w[/bold][/x]", "[d]", ":smile:", "[r]", "[/m]"):
        assert text in file.getvalue()
