"""Everything one worker process is configured by, and how it is read from a file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from engine.config import EngineConfig
from kv_transfer.config import TransportConfig
from settings.security import SecurityConfig
from settings.telemetry.config import LoggingConfig, TelemetryConfig
from worker.config import WorkerConfig


class WorkerSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: EngineConfig = EngineConfig()
    transport: TransportConfig = TransportConfig()
    worker: WorkerConfig = WorkerConfig()
    security: SecurityConfig = SecurityConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    logging: LoggingConfig = LoggingConfig()
