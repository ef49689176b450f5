"""The `transport:` section of the configuration: how KV moves."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TransportConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    pull_mode: Literal["auto", "read", "write"] = Field(
        default="auto",
        description="read: one-sided read; write: the source writes into the reader's blocks at its request; "
        "auto: read on one host, write between hosts.",
    )
    pull_timeout_s: float = Field(default=10.0, gt=0, description="Longest time of one transfer.")
    probe_every_s: float = Field(
        default=1.0, gt=0, description="A path that has been idle for this long is probed with eight bytes."
    )
    ucx_tls: str = Field(default="", description='UCX transports, for example "tcp"; empty = all that UCX finds.')
    ucx_net_devices: str = Field(
        default="",
        description='Network devices for UCX, for example "eth0"; "rdma" = all active RDMA ports that the process may '
        "open, with the GID of RoCE v2 (not yet run on a GPU); empty = all.",
    )
    digest: bool = Field(default=False, description="Hash every block at the source and check it at the reader.")
    slow_bytes_per_s: float | None = Field(
        default=None, gt=0, description="Limit pulls to this rate, to see the effect of a slow network."
    )
