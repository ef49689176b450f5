"""The `router.http:` section of the configuration: limits of the HTTP port."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class HttpConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    max_connections: int = Field(default=8192, ge=1, description="More are answered with 503 and closed.")
    max_header_bytes: int = Field(default=32 << 10, ge=1024, description="Request line and headers together.")
    read_timeout_s: float = Field(default=60.0, gt=0, description="Within this a request has arrived whole.")
    keep_alive_s: int = Field(default=75, ge=1, description="How long an idle connection is kept.")
    write_timeout_s: float = Field(
        default=120.0, gt=0, description="A connection that takes no byte for so long is closed."
    )
    cors_origins: list[str] = Field(
        default_factory=list, description='Origins whose pages may call from a browser; ["*"] is any, none is off.'
    )
