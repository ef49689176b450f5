"""`diptych adapters`: LoRA adapters of a running cluster (router/operating/adapters.py)."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from deploy.clients import RequestFailed, channel_to, list_adapters, load_adapter, unload_adapter
from deploy.console import fail, out
from deploy.operate import TARGET, Json, Target, refused

app = typer.Typer(no_args_is_help=True, help="LoRA adapters: list them; load, replace and unload them while it serves.")
_SHOWN_DIGEST = 8


@app.command(name="list")
def list_command(target: Target = TARGET, as_json: Json = False) -> None:
    """What names stand for, and which workers have it."""
    try:
        with channel_to(target) as channel:
            found = list_adapters(channel)
    except RequestFailed as error:
        refused(error, target)
    if as_json:
        out.print_json(json.dumps({"adapters": [_told(one) for one in found]}))
        return
    if not found:
        out.print("no adapters; `diptych adapters load NAME DIRECTORY` loads one", soft_wrap=True)
        return
    table = Table("name", "digest", "served", "workers", "in slots", "directory", box=None)
    for one in found:
        served = "split or local" if one.split else "local" if one.served else "no"
        having = sum(w.has for w in one.workers)
        in_slots = sum(w.in_slot for w in one.workers)
        table.add_row(
            one.name,
            one.digest[:_SHOWN_DIGEST],
            served,
            f"{having} of {len(one.workers)}",
            str(in_slots),
            one.directory,
        )
    out.print(table)
    _missing(found)


def load_command(
    name: Annotated[str, typer.Argument(help="As requests are to name it")],
    directory: Annotated[str, typer.Argument(help="In PEFT's format; an absolute path that workers can read")],
    target: Target = TARGET,
    group: Annotated[
        list[str] | None, typer.Option(help="Only on workers of this group; more than once: of these")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait", min=1, max=600)] = 60.0,
    as_json: Json = False,
) -> None:
    """Load an adapter on all workers, or replace what the name stood for. Answers that run go on as they began."""
    try:
        with channel_to(target) as channel:
            answer = load_adapter(channel, name, directory, group or (), timeout)
    except RequestFailed as error:
        refused(error, target)
    one = answer.adapter
    if as_json:
        out.print_json(json.dumps(_told(one) | {"replaced": answer.replaced, "took_ms": answer.took_ms}))
    else:
        how = "split or local" if one.split else "local only" if one.served else "nowhere yet"
        instead = f", in place of {answer.replaced[:_SHOWN_DIGEST]}" if answer.replaced else ""
        having = sum(w.has for w in one.workers)
        out.print(
            f"{name}: {one.digest[:_SHOWN_DIGEST]}{instead}, on {having} of {len(one.workers)} workers, served {how}",
            soft_wrap=True,
        )
        _missing([one])
    if not one.served:
        fail(f"no decode worker has {name}; see `diptych adapters list`")


def unload_command(
    name: Annotated[str, typer.Argument(help="As in `diptych adapters list`")],
    target: Target = TARGET,
    as_json: Json = False,
) -> None:
    """No new request gets it; answers that run end with it."""
    try:
        with channel_to(target) as channel:
            answer = unload_adapter(channel, name)
    except RequestFailed as error:
        refused(error, target)
    left = {w.worker_id: w.error for w in answer.workers}
    if as_json:
        out.print_json(json.dumps({"name": name, "digest": answer.digest, "not_yet": left}))
        return
    out.print(f"{name}: {answer.digest[:_SHOWN_DIGEST]} is unloaded", soft_wrap=True)
    for worker, why in left.items():
        out.print(f"  not yet on {worker}: {why}", soft_wrap=True)


app.command(name="load")(load_command)
app.command(name="unload")(unload_command)


def _missing(found: Any) -> None:
    for one in found:
        for worker in one.workers:
            if worker.error:
                out.print(f"  {one.name} is not on {worker.worker_id}: {worker.error}", soft_wrap=True)


def _told(one: Any) -> dict[str, Any]:
    workers = {w.worker_id: {"has": w.has, "in_slot": w.in_slot, "error": w.error} for w in one.workers}
    told = {name: getattr(one, name) for name in ("name", "digest", "directory", "served", "split")}
    return told | {"groups": list(one.groups), "workers": workers}
