"""`python -m prefill_worker --config FILE`, `decode_worker`, or `elastic_worker` for a standby: a worker without Ray.

Exit codes: 0 drained on SIGTERM or SIGINT, 1 could not start, 2 broke or got stuck while serving, 3 could not stop,
4 the event loop got stuck. A second signal skips the drain.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from engine.model_loader import ModelLoadError
from kv_transfer.nixl_agent import NixlUnavailable
from settings.file import SettingsError, read_settings
from settings.process import Leaving, exit_after, say_last
from settings.telemetry.logs import set_up_logging
from settings.telemetry.setup import check_telemetry, end_tracing, set_up_tracing
from worker.server import RunningWorker, WorkerStartError
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_BROKEN_S = 5.0  # a broken worker has said so by then, or will not

Serve = Callable[[str, WorkerSettings], Coroutine[Any, Any, RunningWorker]]


def run(role: str, serve: Serve) -> None:
    module = "elastic_worker" if role == "standby" else f"{role}_worker"
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"One {role} worker.")
    parser.add_argument(
        "--config", required=True, help="YAML file with sections engine, transport, worker, telemetry, logging"
    )
    arguments = parser.parse_args()
    try:
        settings = read_settings(arguments.config, WorkerSettings)
    except SettingsError as error:
        say_last(error)
        sys.exit(1)
    run_worker(role, settings, serve)


def run_worker(role: str, settings: WorkerSettings, serve: Serve) -> NoReturn:
    try:
        check_telemetry(settings.telemetry)
    except SettingsError as error:
        say_last(error)
        sys.exit(1)
    set_up_logging(settings.logging, f"diptych-{role}")
    set_up_tracing(f"diptych-{role}", settings.telemetry, settings.worker.worker_id)
    code = asyncio.run(_serve_until_signalled(role, settings, serve))
    end_tracing()
    logging.shutdown()
    os._exit(code)  # peers may still read our memory: it goes with the process, not piece by piece before it


async def _serve_until_signalled(role: str, settings: WorkerSettings, serve: Serve) -> int:
    leaving = Leaving()
    try:
        worker = await leaving.start(serve(role, settings))
    except (ModelLoadError, NixlUnavailable, WorkerStartError) as error:
        say_last(error)
        return 1
    asked = asyncio.create_task(leaving.asked.wait())
    await asyncio.wait({asked, worker.failed}, return_when=asyncio.FIRST_COMPLETED)
    if worker.failed.done():
        log.error("worker failed: %s", worker.failed.result())
        exit_after(_BROKEN_S, code=2)  # not cancelled: what broke may hold up anything that follows
        await asyncio.wait({worker.withdrawn}, timeout=_BROKEN_S)
        return 2
    await leaving.run(worker.drain, worker.stop, settings.worker.drain_s)
    return 2 if worker.failed.done() else 0
