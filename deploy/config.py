"""cluster.yaml: one file, sections owned by their packages.

model: embedded
engine:    {dtype: bfloat16}          engine/config.py, both pools
transport: {pull_mode: auto}          kv_transfer/config.py
worker:    {drain_s: 30}              worker/config.py
router:    {grpc_port: 8100}          router/config.py
security:  {api_keys: keys.yaml}      settings/security.py
prefill:   {replicas: 1, engine: {max_batch_tokens: 2048}}
decode:    {replicas: 1, num_gpus: 1}  or {groups: {h200: {...}, h100: {...}}}: deploy/pools.py
standby:   {replicas: 0}              started workers without a role (docs/elasticity.md)
scaling:   {budget_gpus: 8}           scaling/config.py: pools that follow the load, under Ray Serve
telemetry: {metrics_port: 9464}       settings/telemetry/config.py; logging likewise
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.pools import Group, PoolConfig, groups_of
from deploy.routers import Place, elsewhere, is_free, place
from engine.config import EngineConfig
from kv_transfer.config import TransportConfig
from router.config import RouterConfig
from scaling.config import ScalingConfig, ScalingError, check
from settings.addresses import from_here, join
from settings.file import SettingsError, validate_settings
from settings.model_path import model_name
from settings.processors import usable
from settings.security import SecurityConfig
from settings.telemetry.config import LoggingConfig, TelemetryConfig
from worker.config import WorkerConfig
from worker.settings import WorkerSettings


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
        if self.scaling.on:
            held = sum(group.replicas * group.counted_gpus for group in self.groups)
            check(self.scaling, *self.gpus_of_workers, held)
            check(self.scaling_of_groups(), *self.gpus_of_workers)
        return self

    @property
    def gpus_of_workers(self) -> tuple[float, float]:
        """Of a prefill and a decode worker that scaling starts. Raises ScalingError."""
        return self.scaled("prefill").counted_gpus, self.scaled("decode").counted_gpus

    def scaled(self, role: str) -> Group:
        """The group of a pool whose count follows the load. Raises ScalingError."""
        groups, wanted = groups_of(role, self.pools[role]), getattr(self.scaling, role).group
        found = next((group for group in groups if group.name == wanted), None)
        if found is not None:
            return found
        key, names = f"scaling.{role}.group", ", ".join(group.name for group in groups)
        if not groups[0].name:
            raise ScalingError(f"{key} is {wanted}, and {role} has no groups; leave it out")
        if not wanted:
            raise ScalingError(f"{role} has groups, and one of them follows the load; set {key} to one of {names}")
        raise ScalingError(f"{key} is {wanted}, and {role} has no such group; known here: {names}")

    def scaling_of_groups(self, scaling: ScalingConfig | None = None) -> ScalingConfig:
        """For the policy, which knows pools only: workers of groups that are not scaled are always there, and hold
        their GPUs. Raises ScalingError.
        """
        scaling = scaling or self.scaling
        if not any(self.pools[role].groups for role in self.pools):
            return scaling
        if scaling.resizes and self.standby.groups:
            raise ScalingError(
                "standby has groups, and scaling starts and stops standbys; describe them without groups"
            )
        if scaling.idle_s is not None:
            raise ScalingError(
                "scaling.idle_s takes an idle cluster to zero, and groups that are not scaled stay; leave it out"
            )
        update: dict[str, object] = {}
        more_gpus = 0.0
        for role in ("prefill", "decode"):
            ours = self.scaled(role)
            others = [group for group in self.groups if group.role == role and group.name != ours.name]
            for group in others:
                if scaling.shift_roles and group.replicas and group.counted_gpus != ours.counted_gpus:
                    raise ScalingError(
                        f"a worker of {group.path} holds {group.counted_gpus:g} GPUs and one of {ours.path} "
                        f"{ours.counted_gpus:g}, so a role that changes would break the budget; set "
                        "scaling.shift_roles to false"
                    )
            more_gpus += sum(group.replicas * (group.counted_gpus - ours.counted_gpus) for group in others)
            if others:
                bounds, stay = getattr(scaling, role), sum(group.replicas for group in others)
                if bounds.max is not None and bounds.max <= stay:
                    raise ScalingError(
                        f"scaling.{role}.max is {bounds.max}, and {stay} workers of the pool's other groups stay; "
                        "raise it, since it counts the whole pool"
                    )
                update[role] = bounds.model_copy(update={"min": max(bounds.min, stay + 1)})
        if scaling.budget_gpus is not None:
            update["budget_gpus"] = scaling.budget_gpus - more_gpus
        return scaling.model_copy(update=update)

    @property
    def served_name(self) -> str:
        """What requests call the model."""
        return self.router.served_model_name or model_name(self.model)

    @property
    def pools(self) -> dict[str, PoolConfig]:
        """By the role that their workers start with."""
        return {"prefill": self.prefill, "decode": self.decode, "standby": self.standby}

    @property
    def groups(self) -> list[Group]:
        """Of all pools, by role and in the order of the file."""
        return [group for role, pool in self.pools.items() for group in groups_of(role, pool)]

    def group(self, role: str, name: str = "") -> Group:
        """Raises SettingsError."""
        groups = groups_of(role, self.pools[role])
        for group in groups:
            if group.name == name:
                return group
        names = ", ".join(group.name for group in groups if group.name)
        if not names:
            raise SettingsError(f"{role} has no groups; leave out the group {name}")
        raise SettingsError(f"{role} has groups, and {name or 'none'} is not one of them; known here: {names}")

    def router_places(self) -> list[Place]:
        """For routers on this machine. The first has what is configured, or cannot start."""
        router, telemetry = self.router_config(), self.telemetry.of_router()
        places = [place(i, router, telemetry) for i in range(router.replicas)]
        return [p if i == 0 or is_free(p) else elsewhere(p) for i, p in enumerate(places)]

    def router_config(self) -> RouterConfig:
        return self.router.model_copy(update={"model": self.model})

    def worker_settings(self, role: str, group: str = "", origin: str = "cluster configuration") -> WorkerSettings:
        """What one replica of a pool's group gets. Raises SettingsError for an override that does not fit.

        The role may change later, so nothing here is of a role alone: the inter-token target binds beside decodes only.
        """
        return self.settings_of(self.group(role, group), origin)

    def settings_of(self, group: Group, origin: str = "cluster configuration") -> WorkerSettings:
        """Raises SettingsError."""
        engine = {**self.engine.model_dump(), "model": self.model}
        if self.engine.itl_target_ms is None:
            engine["itl_target_ms"] = self.router.itl_target_ms
        internal = join(from_here(self.router.internal_host), self.router.internal_port)
        worker = {**self.worker.model_dump(), "router_addresses": [internal]} | (
            {"group": group.name} if group.name else {}
        )
        return validate_settings(
            {
                "engine": {**engine, **group.engine},
                "transport": self.transport.model_dump(),
                "worker": {**worker, **group.worker},
                "security": self.security.model_dump(),
                "telemetry": self.telemetry.of_worker().model_dump(),
                "logging": self.logging.model_dump(),
            },
            WorkerSettings,
            f"{origin}: {group.path}",
        )


def shared_out_here(config: ClusterConfig) -> ClusterConfig:
    """For a cluster of one machine: its cores are shared by its workers (as many as there may be), unless the
    configuration says otherwise.
    """
    if config.engine.threads is not None:
        return config
    workers = sum(pool.replicas for pool in config.pools.values())
    if config.scaling.resizes:
        workers = max(workers, int((config.scaling_of_groups().budget_gpus or 0.0) / min(config.gpus_of_workers)))
    threads = threads_per_worker(workers)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"threads": threads})})


def threads_per_worker(workers: int) -> int:
    """The cores that may be used here, shared by its workers without oversubscription."""
    return max(1, usable() // max(1, workers))
