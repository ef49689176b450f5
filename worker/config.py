"""The `worker:` section of the configuration: what both pools' workers need besides engine and transport."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class WorkerConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    worker_id: str = Field(default="", description="Stable name; empty = role, host and process id.")
    group: str = Field(
        default="", description="Of its pool, as `diptych status` shows it; cluster.yaml's groups set it."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on; loopback by default.")
    port: int = Field(default=0, ge=0, le=65535, description="gRPC port; 0 = chosen by the system.")
    advertise_host: str = Field(default="", description="Host that routers and peers connect to; empty = `host`.")
    router_addresses: tuple[str, ...] = Field(
        default=("127.0.0.1:8101",), description="Internal addresses of the routers to register with."
    )
    drain_s: float = Field(
        default=30.0, gt=0, le=1e6, description="How long a draining worker may take to finish its requests."
    )
    report_every_s: float = Field(default=0.1, gt=0, description="Shortest time between two load reports.")
    lease_s: float = Field(
        default=10.0,
        ge=5.0,
        description="How long announced blocks wait for a silent reader. A reader gives up its source after 3 s of "
        "silence, and renews the lease every third of this time. What exceeds 5 s is the margin between the two.",
    )
    max_leased_share: float = Field(default=0.6, gt=0, le=1, description="Share of the pool that leases may hold.")
    max_leases: int = Field(default=4096, gt=0)
    follow_wait_s: float = Field(
        default=10.0, gt=0, description="How long a reader may wait at a source that does not know the handoff yet."
    )
    announce_timeout_s: float = Field(
        default=60.0, gt=0, description="Longest silence of a source between two announcements of one handoff."
    )
    room_wait_s: float = Field(default=2.0, gt=0, description="How long a handoff may wait for free decode blocks.")
    max_quarantined_share: float = Field(
        default=0.25, gt=0, le=1, description="Share of the pool that abandoned pulls may hold."
    )
    max_blocks_per_pull: int = Field(default=32, gt=0, description="Blocks in one transfer; small keeps calls short.")
    stall_s: float = Field(
        default=20.0,
        gt=0,
        description="If a step, or anything else in the engine or event loop, takes longer, it counts as a hang and "
        "the worker ends. For a step, the limit is at least four times a full step, as measured in the warm-up.",
    )
    transport_stall_s: float = Field(
        default=10.0,
        gt=0,
        description="The same for one call of the transport. Keep it above 3 s: a silent peer costs that much.",
    )
    warm_up: bool = Field(
        default=True, description="Run a few steps before registering, so that the first request is not slow."
    )
