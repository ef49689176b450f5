"""cluster.yaml: one file, sections owned by their packages.

model: embedded
engine:    {dtype: bfloat16}          engine/config.py, both pools
transport: {pull_mode: auto}          kv_transfer/config.py
worker:    {drain_s: 30}              worker/config.py
router:    {grpc_port: 8100}          router/config.py
security:  {api_keys: keys.yaml}      settings/security.py
prefill:   {replicas: 1, engine: {max_batch_tokens: 2048}}
decode:    {replicas: 1, num_gpus: 1}
standby:   {replicas: 0}              started workers without a role (docs/elasticity.md)
scaling:   {budget_gpus: 8}           scaling/config.py: pools that follow the load, under Ray Serve
telemetry: {metrics_port: 9464}       settings/telemetry/config.py; logging likewise
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.routers import Place, elsewhere, is_free, place
from engine.config import EngineConfig
from kv_transfer.config import TransportConfig
from router.config import RouterConfig
from scaling.config import ScalingConfig, check
from settings.addresses import from_here, join
from settings.file import validate_settings
from settings.model_path import model_name
from settings.processors import usable
from settings.security import SecurityConfig
from settings.telemetry.config import LoggingConfig, TelemetryConfig
from worker.config import WorkerConfig
from worker.settings import WorkerSettings


class PoolConfig(BaseModel):
    """The workers that start with one role. `engine` and `worker` override the shared sections for this pool alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(default=1, ge=0)
    surge: int = Field(
        default=1,
        ge=0,
        le=1,
        description="Workers beyond `replicas` that an upgrade under Ray may have: 1 = a new one is ready before an "
        "old one leaves, 0 = an old one leaves first.",
    )
    num_cpus: float = Field(default=0.0, ge=0, description="CPUs that Ray reserves for each replica; 0 = none.")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each replica.")
    resources: dict[str, float] = Field(
        default_factory=dict, description="Custom Ray resources that each replica needs, to choose where the pool runs."
    )
    engine: dict[str, Any] = Field(default_factory=dict)
    worker: dict[str, Any] = Field(default_factory=dict)


class ClusterTelemetryConfig(TelemetryConfig):
    """`metrics_port` is the router's; it tells Prometheus at /targets where the workers' are."""

    metrics_port: int | None = Field(
        default=9464, ge=0, le=65535, description="Port of the router; 0 = chosen by the system, null = off."
    )
    worker_metrics_port: int | None = Field(
        default=0, ge=0, le=65535, description="Port of each worker; 0 = chosen by the system, null = off."
    )

    def of_worker(self) -> TelemetryConfig:
        return self._with_port(self.worker_metrics_port)

    def of_router(self) -> TelemetryConfig:
        return self._with_port(self.metrics_port)

    def _with_port(self, port: int | None) -> TelemetryConfig:
        common = self.model_dump(exclude={"metrics_port", "worker_metrics_port"})
        return TelemetryConfig.model_validate({**common, "metrics_port": port})


class RayConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str = Field(default="", description="An existing Ray cluster; empty = start one on this machine.")
    authentication: Literal["token", "none"] = Field(
        default="token", description="What a joined cluster requires. A cluster started here always requires a token."
    )
    token_file: str = Field(
        default="",
        description="File with the token. Empty: a joined cluster uses $RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH or "
        "~/.ray/auth_token; one started here makes a new token at every start.",
    )
    object_store_bytes: int = Field(
        default=100 << 20, ge=78643200, description="Size of the object store of a cluster started here."
    )
    router_resources: dict[str, float] = Field(default_factory=dict)


class ClusterConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(default="embedded", description='A directory, a hub id, or "embedded" for the small model.')
    engine: EngineConfig = EngineConfig()
    transport: TransportConfig = TransportConfig()
    worker: WorkerConfig = WorkerConfig()
    router: RouterConfig = RouterConfig()
    prefill: PoolConfig = PoolConfig()
    decode: PoolConfig = PoolConfig()
    standby: PoolConfig = Field(
        default=PoolConfig(replicas=0),
        description="Workers that start without a role: weights loaded, sent nothing until they get one.",
    )
    scaling: ScalingConfig = Field(
        default=ScalingConfig(), description="How many workers the pools have, under Ray Serve."
    )
    security: SecurityConfig = SecurityConfig()
    telemetry: ClusterTelemetryConfig = ClusterTelemetryConfig()
    logging: LoggingConfig = LoggingConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _scaling_can_be_met(self) -> ClusterConfig:
        if self.scaling.resizes and self.standby.replicas > self.scaling.standbys:
            raise ValueError(
                f"standby.replicas is {self.standby.replicas} and scaling.standbys is {self.scaling.standbys}, so the "
                "others would be stopped; raise scaling.standbys or lower standby.replicas"
            )
        check(
            self.scaling,
            *self.gpus_of_workers,
            sum(pool.replicas * (pool.num_gpus or 1.0) for pool in self.pools.values()),
        )
        return self

    @property
    def gpus_of_workers(self) -> tuple[float, float]:
        """Of a prefill and a decode worker, as the scaling budget counts them: one that reserves none counts as one."""
        return self.prefill.num_gpus or 1.0, self.decode.num_gpus or 1.0

    @property
    def served_name(self) -> str:
        """What requests call the model."""
        return self.router.served_model_name or model_name(self.model)

    @property
    def pools(self) -> dict[str, PoolConfig]:
        """By the role that their workers start with."""
        return {"prefill": self.prefill, "decode": self.decode, "standby": self.standby}

    def router_places(self) -> list[Place]:
        """For routers on this machine. The first has what is configured, or cannot start."""
        router, telemetry = self.router_config(), self.telemetry.of_router()
        places = [place(i, router, telemetry) for i in range(router.replicas)]
        return [p if i == 0 or is_free(p) else elsewhere(p) for i, p in enumerate(places)]

    def router_config(self) -> RouterConfig:
        return self.router.model_copy(update={"model": self.model})

    def worker_settings(self, role: str, origin: str = "cluster configuration") -> WorkerSettings:
        """What one replica of a pool gets. Raises SettingsError for an override that does not fit.

        The role may change later, so nothing here is of a role alone: the inter-token target binds beside decodes only.
        """
        pool = self.pools[role]
        engine = {**self.engine.model_dump(), "model": self.model}
        if self.engine.itl_target_ms is None:
            engine["itl_target_ms"] = self.router.itl_target_ms
        internal = join(from_here(self.router.internal_host), self.router.internal_port)
        worker = {**self.worker.model_dump(), "router_addresses": [internal]}
        return validate_settings(
            {
                "engine": {**engine, **pool.engine},
                "transport": self.transport.model_dump(),
                "worker": {**worker, **pool.worker},
                "security": self.security.model_dump(),
                "telemetry": self.telemetry.of_worker().model_dump(),
                "logging": self.logging.model_dump(),
            },
            WorkerSettings,
            f"{origin}: {role}",
        )


def shared_out_here(config: ClusterConfig) -> ClusterConfig:
    """For a cluster of one machine: its cores are shared by its workers (as many as there may be), unless the
    configuration says otherwise.
    """
    if config.engine.threads is not None:
        return config
    workers = sum(pool.replicas for pool in config.pools.values())
    if config.scaling.resizes:
        assert config.scaling.budget_gpus is not None
        workers = max(workers, int(config.scaling.budget_gpus / min(config.gpus_of_workers)))
    threads = threads_per_worker(workers)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"threads": threads})})


def threads_per_worker(workers: int) -> int:
    """The cores that may be used here, shared by its workers without oversubscription."""
    return max(1, usable() // max(1, workers))
