"""Log lines for people, or one JSON object each. Both name request, worker and leg where a line is about one.

log.info("ended: %s", outcome, extra={"request_id": request_id})
"""

from __future__ import annotations

import datetime
import json
import logging

from settings.telemetry.config import LogFormat, LoggingConfig
from settings.telemetry.repeats import Repeats

CONTEXT = ("request_id", "worker_id", "leg", "trace_id")


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        told = [f"{key}={value}" for key in CONTEXT if (value := getattr(record, key, None)) not in (None, "")]
        return f"{line} [{' '.join(told)}]" if told else line


class JsonFormatter(logging.Formatter):
    """One line each, whatever the message holds: a line break in it is escaped."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "service": self._service,
        }
        for key in CONTEXT:
            value = getattr(record, key, None)
            if value not in (None, ""):
                line[key] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logging(config: LoggingConfig, service: str) -> None:
    """To stderr. What others set up before is replaced."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(service) if config.format is LogFormat.JSON else TextFormatter())
    handler.addFilter(Repeats())
    logging.basicConfig(level=config.level.value.upper(), handlers=[handler], force=True)
    if config.level.value == "debug":
        for noisy in ("asyncio", "grpc", "urllib3", "opentelemetry"):
            logging.getLogger(noisy).setLevel(logging.INFO)
