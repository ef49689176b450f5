"""`diptych scaling`: what the scaling policy would do with a running cluster, and why."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.clients import RequestFailed, channel_to, get_cluster, get_scaling, tell_scaling
from deploy.config import ClusterConfig
from deploy.console import err, fail, out
from deploy.scaling_view import all_to_dict, line, render, render_one, to_dict
from deploy.scaling_watch import Watcher, watcher_of
from scaling.config import ScalingConfig, ScalingError
from scaling.policy import decide
from scaling.report import Report
from scaling.state import ScalingState
from scaling.weighing import Terms
from scaling.wire import report_to_wire
from settings.file import SettingsError, read_settings

_MOST_DECISIONS = 384  # that a router has


def scaling(
    config: Annotated[Path | None, typer.Option(help="cluster.yaml, for `scaling:` and the targets")] = None,
    budget: Annotated[float | None, typer.Option(help="GPUs; in place of scaling.budget_gpus", min=1)] = None,
    target: Annotated[
        str, typer.Option(help="host:port of every router, with commas: a:8100,b:8100")
    ] = "localhost:8100",
    looks: Annotated[int, typer.Option(help="Decisions to wait for; 0 = until Ctrl-C", min=0)] = 0,
    record: Annotated[
        bool,
        typer.Option("--record", help="Have the routers keep each decision: `diptych explain scaling`, page, metrics"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for each decision")] = False,
) -> None:
    """Say what the scaling policy would do with a running cluster, and why. Changes no worker.

    One line for each decision; the last one with its numbers and what was weighed against it.
    """
    try:
        cluster = read_settings(config, ClusterConfig) if config is not None else ClusterConfig()
    except SettingsError as error:
        fail(str(error))
    asked = cluster.scaling.model_copy(update={"dry_run": True, **({"budget_gpus": budget} if budget else {})})
    try:
        settings = cluster.scaling_of_groups(asked)
        terms = Terms(cluster.router.itl_target_ms, *cluster.gpus_of_workers)
        watcher = watcher_of(cluster)
    except (ScalingError, SettingsError) as error:
        fail(str(error))
    if not settings.on:
        fail("no budget: set scaling.budget_gpus in the file of --config, or give --budget")
    try:
        with ExitStack() as stack:
            channels = [stack.enter_context(channel_to(one.strip())) for one in target.split(",")]
            _watch(channels, watcher, settings, terms, looks, record, as_json)
    except RequestFailed as error:
        fail(f"{error.code}: {error}")
    except KeyboardInterrupt:
        return


def _watch(
    channels: list[Any],
    watcher: Watcher,
    settings: ScalingConfig,
    terms: Terms,
    looks: int,
    record: bool,
    as_json: bool,
) -> None:
    state, told = ScalingState(), 0
    decider = f"`diptych scaling` on {socket.gethostname()}, process {os.getpid()}"
    while True:
        seen = watcher.look([get_cluster(channel, 5.0) for channel in channels], time.monotonic())
        if seen is not None:
            decision, state = decide(seen, state, settings, terms)
            told += 1
            last = bool(looks) and told >= looks
            report = Report.of(decision, seen, decider, told, settings.interval_s)
            message = report_to_wire(report, time.monotonic())
            if record:
                _record(channels, message)
            if as_json:
                out.print_json(json.dumps(to_dict(message)))
            else:
                out.print(render_one(message) if last else line(message), soft_wrap=True)
            if last:
                return
        time.sleep(settings.interval_s)


def _record(channels: list[Any], message: Any) -> None:
    """A router that cannot be told misses this one; the watch goes on."""
    for channel in channels:
        try:
            tell_scaling(channel, message)
        except RequestFailed as error:
            err.print(f"a router did not record this decision: {error.code}: {error}", style="red", soft_wrap=True)


SCALING = "scaling"  # in place of a request's id: `diptych explain scaling`


def explain_scaling(channel: Any, last: int, *, as_json: bool) -> None:
    """Raises RequestFailed."""
    told = get_scaling(channel, _MOST_DECISIONS)
    if as_json:
        out.print_json(json.dumps(all_to_dict(told, last)))
    elif told.HasField("current"):
        out.print(render(told, last, out.width), soft_wrap=True)
    else:
        out.print(
            "no scaling decision has been recorded here. Set scaling.budget_gpus in cluster.yaml; without Ray, keep\n"
            "`diptych scaling --record` running, which says what would be done.",
            soft_wrap=True,
        )
