"""Commands of an operator: `diptych switch`, `drain`, `migrate`, `scale` (router/operating/), and `leave` for a pod."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.status import Status

from deploy.clients import (
    ROLE_NAMES,
    ROLES,
    RequestFailed,
    channel_to,
    drain_worker,
    get_scaling,
    migrate,
    scale,
    shuffled,
    switch_role,
)
from deploy.console import err, fail, out
from deploy.leaving import DIRECTORY, leave

Target = Annotated[str, typer.Option(help="host:port of a router, or of several of one cluster: a:8100,b:8100")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text")]
Force = Annotated[bool, typer.Option("--force", help="Also if it is the last worker of its role")]
TARGET = "localhost:8100"
_LOOK_S = 0.5
_DECISIONS = 40


def refused(error: RequestFailed, target: str) -> NoReturn:
    if error.code == "UNAVAILABLE" and "connect" in str(error).lower():
        fail(f"no router answers at {target}; start one with `diptych up`, or name another with --target")
    fail(f"{error.code}: {error}")


def _ms(value: float) -> str:
    return f"{value / 1e3:.1f} s" if value >= 1000 else f"{value:.0f} ms"


def switch_command(
    worker: Annotated[str, typer.Argument(help="As in `diptych status`")],
    to: Annotated[str, typer.Option("--to", help="prefill, decode or standby")],
    target: Target = TARGET,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Give a worker another role, while it runs. What it has goes on; long answers move elsewhere."""
    if to not in ROLES:
        fail(f"--to is {to!r}; use prefill, decode or standby")
    try:
        with channel_to(target) as channel:
            answer = switch_role(channel, worker, to, force=force)
    except RequestFailed as error:
        refused(error, target)
    before = ROLE_NAMES.get(answer.switch.before, "?")
    if as_json:
        out.print_json(json.dumps({"worker": worker, "before": before, "role": to, "took_ms": answer.took_ms}))
    elif before == to:
        out.print(f"{worker} is {to} already", soft_wrap=True)
    else:
        out.print(f"{worker}: {before} → {to}, after {_ms(answer.took_ms)}", soft_wrap=True)


def drain_command(
    worker: Annotated[str, typer.Argument(help="As in `diptych status`")],
    target: Target = TARGET,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until nothing is left", min=1, max=86400)] = 300.0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a standby of a worker, and wait until nothing is left on it: long answers move, short ones end."""
    said: Any = None
    try:
        with channel_to(target) as channel, Status(f"draining {worker}", console=err) as status:
            for said in drain_worker(channel, worker, timeout, force=force):
                status.update(f"draining {worker}: {_progress(said)}")
    except RequestFailed as error:
        refused(error, target)
    if said is None or not said.done:
        fail(f"the router ended the drain of {worker} without a word; look at its log, and repeat")
    if as_json:
        told = {name: getattr(said, name) for name in ("migrated", "ended", "left", "elapsed_ms")}
        out.print_json(json.dumps({"worker": worker, **told}))
    else:
        out.print(
            f"{worker} is empty after {_ms(said.elapsed_ms)}: {said.migrated} answers go on elsewhere, "
            f"{said.ended} ended; it is a standby now",
            soft_wrap=True,
        )


def _progress(said: Any) -> str:
    others = said.running_sequences - said.left
    of_others = f", {others} of other routers" if others > 0 else ""
    return (
        f"{said.left} left ({said.migrating} on their way{of_others}), {said.migrated} migrated, {said.ended} ended, "
        f"{_ms(said.elapsed_ms)}"
    )


def leave_command(
    hold: Annotated[float, typer.Option(help="Seconds to go on as before, while others stop sending", min=0)] = 0.0,
    timeout: Annotated[float, typer.Option(help="Seconds to wait after that", min=0)] = 60.0,
) -> None:
    """Drain what runs in this pod before Kubernetes ends it (a preStop hook): long answers move, short ones end."""
    directory = os.environ.get(DIRECTORY, "")
    if not Path(directory).is_dir() or not directory:
        fail(f"{DIRECTORY} is {directory!r}; it names a directory of the pod, which its replicas know, too")
    left = leave(Path(directory), hold, timeout)
    for what, pids in (("drained", left.drained), ("not drained", left.not_drained), ("still busy", left.still_there)):
        if pids:
            out.print(f"{what}: {', '.join(map(str, pids))}", soft_wrap=True)
    raise typer.Exit(0 if left.clean else 1)


def migrate_command(
    request: Annotated[str, typer.Argument(help="Id of a running request, as in `diptych status`")],
    to: Annotated[str, typer.Option("--to", help="The worker that is to go on with it")],
    target: Target = TARGET,
    as_json: Json = False,
) -> None:
    """Move one running answer to another decode worker, and wait until it runs there."""
    moved = _migrate(request, to, target)
    paused = moved.pause_ms if moved.HasField("pause_ms") else None
    if as_json:
        told = {"source": moved.source_worker, "target": moved.target_worker, "outcome": moved.outcome}
        told |= {"pause_ms": paused, "pulled_bytes": moved.pulled_bytes, "took_ms": moved.took_ms}
        out.print_json(json.dumps({"request": request, **told}))
    if moved.outcome != "done":
        fail(f"{request} stays on {moved.source_worker}: {moved.outcome}; nothing has happened to the answer")
    if not as_json:
        pause = "it had ended there" if paused is None else f"paused for {_ms(paused)}"
        out.print(
            f"{request}: {moved.source_worker} → {moved.target_worker}, {pause}, "
            f"{moved.pulled_bytes / 1e6:.1f} MB pulled, {_ms(moved.took_ms)} in all",
            soft_wrap=True,
        )


def _migrate(request: str, to: str, target: str) -> Any:
    """By the router that has the request: each knows of its own alone."""
    last: RequestFailed | None = None
    for one in shuffled(target):
        try:
            with channel_to(one) as channel:
                return migrate(channel, request, to)
        except RequestFailed as error:
            last = error if last is None or error.code != "UNAVAILABLE" else last
            if error.code not in ("NOT_FOUND", "UNAVAILABLE"):
                break
    assert last is not None
    refused(last, target)


def scale_command(
    counts: Annotated[list[str], typer.Argument(help="prefill=N, decode=M, or both")],
    target: Target = TARGET,
    force: Annotated[bool, typer.Option("--force", help="Also down to none of a role")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be switched")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for workers that have to start", min=0)] = 600.0,
    as_json: Json = False,
) -> None:
    """Switch roles and standbys, as few as it takes, until so many workers prefill and decode. Where a scaler runs
    (`scaling:` under Ray Serve) it is asked to start those that lack.
    """
    wanted = {}
    for text in counts:
        role, _, count = text.partition("=")
        if role not in ("prefill", "decode") or not count.isdecimal() or role in wanted:
            fail(f"{text!r} is not prefill=N or decode=M, each once; for example: diptych scale prefill=3 decode=5")
        wanted[role] = int(count)
    try:
        with channel_to(target) as channel:
            answer = scale(channel, wanted, force=force, dry_run=dry_run)
        ready, why_not = {role: getattr(answer, role) for role in ROLES}, ""
        if answer.asked and not dry_run:
            ready, why_not = _grown(wanted, answer.asked, target, timeout)
    except RequestFailed as error:
        refused(error, target)
    except ValueError as error:
        fail(f"a count is out of range: {error}")
    switches = [(s.worker_id, ROLE_NAMES.get(s.before, "?"), ROLE_NAMES.get(s.role, "?")) for s in answer.switches]
    if as_json:
        done = [{"worker": worker, "before": before, "role": role} for worker, before, role in switches]
        told = {"asked": answer.asked} if answer.asked else {}
        out.print_json(json.dumps({"switches": done, "ready": ready, "dry_run": dry_run} | told))
    if why_not:
        fail(why_not)
    if as_json:
        return
    if answer.asked:
        out.print(f"{answer.asked} {'would be' if dry_run else 'was'} asked to start workers", soft_wrap=True)
    for worker, before, role in switches:
        out.print(f"{worker}: {before} → {role}{' (would be)' if dry_run else ''}", soft_wrap=True)
    if not switches and not answer.asked:
        out.print("nothing to switch", soft_wrap=True)
    out.print("ready: " + ", ".join(f"{count} {role}" for role, count in ready.items()), soft_wrap=True)


def _grown(wanted: Mapping[str, int], asked: str, target: str, timeout_s: float) -> tuple[dict[str, int], str]:
    """What is ready when it is as wanted, or when it will not be: then also why and the fix. Raises RequestFailed."""
    deadline = time.monotonic() + timeout_s
    with Status(f"{asked} was asked", console=err) as status, channel_to(target) as channel:
        first: int | None = None
        while True:
            now = get_scaling(channel, 1).current
            first = now.number if first is None else first
            ready = {role: getattr(now.ready, role) for role in ROLES}
            if _are(now.ready, wanted):
                return ready, ""
            # The next one may have been under way when it was asked.
            heard = now.number >= first + 2
            if heard and not _are(now.after, wanted):
                decisions = [d for d in get_scaling(channel, _DECISIONS).decisions if d.number >= first]
                # What came after it speaks of other things.
                refused = [d for d in decisions if _are(d.before, wanted) and not _are(d.after, wanted)]
                told = min(refused, key=lambda d: d.number, default=now)
                counts = f"prefill={told.after.prefill} decode={told.after.decode}"
                return ready, f"{told.decider} goes for {counts}: {told.reason}; see `diptych explain scaling`"
            said = ", ".join(f"{count} {role}" for role, count in ready.items())
            status.update(f"{asked} starts workers; ready: {said}")
            if time.monotonic() > deadline:
                left = "they go on starting; `diptych status` and `diptych explain scaling` show how far they are"
                return ready, f"after {timeout_s:g} s there are {said}; {left}"
            time.sleep(_LOOK_S)


def _are(counts: Any, wanted: Mapping[str, int]) -> bool:
    return all(getattr(counts, role) == count for role, count in wanted.items())


def add_operator_commands(app: typer.Typer) -> None:
    app.command(name="switch")(switch_command)
    app.command(name="drain")(drain_command)
    app.command(name="leave")(leave_command)
    app.command(name="migrate")(migrate_command)
    app.command(name="scale")(scale_command)
