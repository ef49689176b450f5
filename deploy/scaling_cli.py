"""`diptych scaling`: what the scaling policy would do with a running cluster, and why."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from deploy.clients import RequestFailed, channel_to, get_cluster
from deploy.config import ClusterConfig
from deploy.console import fail, out
from deploy.scaling_watch import Watcher, line, render, to_dict
from scaling.config import ScalingConfig
from scaling.policy import decide
from scaling.state import ScalingState
from scaling.weighing import Terms
from settings.file import SettingsError, read_settings


def scaling(
    config: Annotated[Path | None, typer.Option(help="cluster.yaml, for `scaling:` and the targets")] = None,
    budget: Annotated[float | None, typer.Option(help="GPUs; in place of scaling.budget_gpus", min=1)] = None,
    target: Annotated[
        str, typer.Option(help="host:port of every router, with commas: a:8100,b:8100")
    ] = "localhost:8100",
    looks: Annotated[int, typer.Option(help="Decisions to wait for; 0 = until Ctrl-C", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for each decision")] = False,
) -> None:
    """Say what the scaling policy would do with a running cluster, and why. Changes nothing.

    One line for each decision; the last one with its numbers and what was weighed against it.
    """
    try:
        cluster = read_settings(config, ClusterConfig) if config is not None else ClusterConfig()
    except SettingsError as error:
        fail(str(error))
    settings = cluster.scaling.model_copy(update={"dry_run": True, **({"budget_gpus": budget} if budget else {})})
    if not settings.on:
        fail("no budget: set scaling.budget_gpus in the file of --config, or give --budget")
    terms = Terms(cluster.router.itl_target_ms, *cluster.gpus_of_workers)
    decode = cluster.worker_settings("decode").engine
    watcher = Watcher(decode.block_tokens, decode.max_running_sequences)
    try:
        with ExitStack() as stack:
            channels = [stack.enter_context(channel_to(one.strip())) for one in target.split(",")]
            _watch(channels, watcher, settings, terms, looks, as_json)
    except RequestFailed as error:
        fail(f"{error.code}: {error}")
    except KeyboardInterrupt:
        return


def _watch(channels: list, watcher: Watcher, settings: ScalingConfig, terms: Terms, looks: int, as_json: bool) -> None:
    state, told = ScalingState(), 0
    while True:
        seen = watcher.look([get_cluster(channel, 5.0) for channel in channels], time.monotonic())
        if seen is not None:
            decision, state = decide(seen, state, settings, terms)
            told += 1
            last = bool(looks) and told >= looks
            if as_json:
                out.print_json(json.dumps(to_dict(decision)))
            else:
                out.print(render(decision) if last else line(decision), soft_wrap=True)
            if last:
                return
        time.sleep(settings.interval_s)
