"""The `telemetry:` and `logging:` sections of every process."""

from __future__ import annotations

import enum

from pydantic import BaseModel, ConfigDict, Field


class PoolPrices(BaseModel):
    """What the accelerators of one worker cost for an hour, in any currency; 0 = not told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefill: float = Field(default=0.0, ge=0)
    decode: float = Field(default=0.0, ge=0)


class TelemetryConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics_host: str = Field(
        default="127.0.0.1", description="Address of the Prometheus endpoint; loopback by default."
    )
    metrics_port: int | None = Field(
        default=0,
        ge=0,
        le=65535,
        description="Its port; 0 = chosen by the system (see the log or the router's /targets), null = off.",
    )
    otlp_endpoint: str = Field(
        default="",
        description="Collector for traces and metrics, OTLP over gRPC; empty = "
        "OTEL_EXPORTER_OTLP_ENDPOINT, or off. The other OTEL_* variables apply, too.",
    )
    trace_ratio: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of requests to trace if the client did not decide; empty = OTEL_TRACES_SAMPLER, or all.",
    )
    gpu_price_per_hour: PoolPrices = Field(
        default=PoolPrices(),
        description="For each pool, the price of all GPUs of one worker; enables the router's cost metrics. A standby "
        "costs what a decode worker does.",
    )


class LogFormat(enum.StrEnum):
    TEXT = "text"
    JSON = "json"


class LogLevel(enum.StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LoggingConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: LogFormat = Field(default=LogFormat.TEXT, description="text, or json: one object per line.")
    level: LogLevel = Field(default=LogLevel.INFO, description="debug logs every request.")
