"""`python -m router --config FILE`: a router without Ray. SIGTERM drains; a second one does not wait."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import NoReturn

from pydantic import BaseModel, ConfigDict

from router.config import RouterConfig
from router.server import RouterStartError, serve
from settings.file import SettingsError, read_settings
from settings.process import Leaving, say_last
from settings.security import SecurityConfig
from settings.telemetry.config import LoggingConfig, TelemetryConfig
from settings.telemetry.logs import set_up_logging
from settings.telemetry.setup import check_telemetry, end_tracing, set_up_tracing


class RouterSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    router: RouterConfig = RouterConfig()
    security: SecurityConfig = SecurityConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    logging: LoggingConfig = LoggingConfig()


async def _serve_until_signalled(settings: RouterSettings) -> int:
    leaving = Leaving()
    try:
        router = await leaving.start(serve(settings.router, settings.security, settings.telemetry))
    except RouterStartError as error:
        say_last(error)
        return 1
    await leaving.asked.wait()
    await leaving.run(router.drain, router.stop, settings.router.drain_s)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m router", description="The request router.")
    parser.add_argument("--config", required=True, help="YAML file with sections router, security, telemetry, logging")
    arguments = parser.parse_args()
    try:
        settings = read_settings(arguments.config, RouterSettings)
    except SettingsError as error:
        say_last(error)
        sys.exit(1)
    run_router(settings)


def run_router(settings: RouterSettings) -> NoReturn:
    try:
        check_telemetry(settings.telemetry)
    except SettingsError as error:
        say_last(error)
        sys.exit(1)
    set_up_logging(settings.logging, "diptych-router")
    set_up_tracing("diptych-router", settings.telemetry, settings.router.router_id)
    code = asyncio.run(_serve_until_signalled(settings))
    end_tracing()
    sys.exit(code)


if __name__ == "__main__":
    main()
