"""`python -m router --config FILE`: a router without Ray. SIGTERM drains; a second one does not wait."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

from pydantic import BaseModel, ConfigDict

from router.config import RouterConfig
from router.server import RouterStartError, serve
from settings.file import SettingsError, read_settings
from settings.process import Leaving
from settings.security import SecurityConfig
from settings.tracing import set_up_tracing


class RouterSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    router: RouterConfig = RouterConfig()
    security: SecurityConfig = SecurityConfig()


async def _serve_until_signalled(config: RouterConfig, security: SecurityConfig) -> int:
    leaving = Leaving()
    try:
        router = await serve(config, security)
    except RouterStartError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    await leaving.asked.wait()
    await leaving.run(router.drain, router.stop, config.drain_s)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m router", description="The request router.")
    parser.add_argument("--config", required=True, help="YAML file with the sections router, security")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s %(message)s")
    try:
        settings = read_settings(arguments.config, RouterSettings)
    except SettingsError as error:
        sys.exit(str(error))
    set_up_tracing("diptych-router")
    sys.exit(asyncio.run(_serve_until_signalled(settings.router, settings.security)))


if __name__ == "__main__":
    main()
