"""The pools of cluster.yaml, and their groups: workers of one pool that differ in device, degree, memory or speed.

decode:
  engine: {max_batch_tokens: 512}             for all of the pool's groups
  groups:
    h200: {replicas: 4, num_gpus: 1}
    h100: {replicas: 2, num_gpus: 2, engine: {tensor_parallel: 2}}

A pool without `groups` is one group without a name. A group is deployed, upgraded and counted by itself; routers see
workers, learn what each can do, and need to know nothing of groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Home = str  # of workers, what they were started as: a role, or role/group
GroupName = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)]


class GroupConfig(BaseModel):
    """What differs from its pool. Unset: as the pool has it. `engine` and `worker` override the pool's, key by key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(default=1, ge=0)
    surge: int | None = Field(default=None, ge=0, le=1)
    num_cpus: float | None = Field(default=None, ge=0)
    num_gpus: float | None = Field(default=None, ge=0)
    resources: dict[str, float] | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    worker: dict[str, Any] = Field(default_factory=dict)


class PoolConfig(BaseModel):
    """The workers that start with one role. `engine` and `worker` override the shared sections for this pool alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(default=1, ge=0, description="Workers. With `groups`: left out, since each has its own.")
    surge: int = Field(
        default=1,
        ge=0,
        le=1,
        description="Workers beyond `replicas` that an upgrade under Ray may have: 1 = a new one is ready before an "
        "old one leaves, 0 = an old one leaves first.",
    )
    num_cpus: float = Field(
        default=0.0, ge=0, description="CPUs that Ray reserves for each replica, all its ranks together; 0 = none."
    )
    num_gpus: float = Field(
        default=0.0, ge=0, description="GPUs that Ray reserves for each replica: one for each of its ranks."
    )
    resources: dict[str, float] = Field(
        default_factory=dict, description="Custom Ray resources that each replica needs, to choose where the pool runs."
    )
    engine: dict[str, Any] = Field(default_factory=dict)
    worker: dict[str, Any] = Field(default_factory=dict)
    groups: dict[GroupName, GroupConfig] = Field(
        default_factory=dict, description="Workers that differ, by the name of their group; none = all are alike."
    )

    @model_validator(mode="after")
    def _of_groups(self) -> PoolConfig:
        """`replicas` becomes that of all groups, for whoever counts the pool."""
        if not self.groups:
            return self
        workers = {f"groups.{name}.worker": group.worker for name, group in self.groups.items()}
        for path, worker in {"worker": self.worker, **workers}.items():
            if worker.get("group"):
                raise ValueError(
                    f"{path}.group is {worker['group']}, and workers of a group are called after it; leave it out, and "
                    "rename the group instead"
                )
        total = sum(group.replicas for group in self.groups.values())
        if "replicas" in self.model_fields_set and self.replicas != total:
            raise ValueError(
                f"replicas is {self.replicas}, and its groups have {total} together; leave it out, and set "
                "groups.NAME.replicas"
            )
        object.__setattr__(self, "replicas", total)  # frozen for everybody else
        return self


@dataclass(frozen=True, slots=True)
class Group:
    """Workers that are alike, with all that holds for them."""

    role: str
    name: str  # "" = all of the pool
    replicas: int
    surge: int
    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float]
    engine: Mapping[str, Any]  # over the shared sections
    worker: Mapping[str, Any]

    @property
    def home(self) -> Home:
        return f"{self.role}/{self.name}" if self.name else self.role

    @property
    def title(self) -> str:
        """As names of processes and workers begin."""
        return self.home.replace("/", "-")

    @property
    def path(self) -> str:
        """In cluster.yaml."""
        return f"{self.role}.groups.{self.name}" if self.name else self.role

    @property
    def counted_gpus(self) -> float:
        """Of one worker, as the scaling budget counts: one that reserves none counts as one."""
        return self.num_gpus or 1.0


def groups_of(role: str, pool: PoolConfig) -> list[Group]:
    """At least one."""
    if not pool.groups:
        return [_group(role, "", pool, GroupConfig(replicas=pool.replicas))]
    return [_group(role, name, pool, group) for name, group in pool.groups.items()]


def _group(role: str, name: str, pool: PoolConfig, own: GroupConfig) -> Group:
    return Group(
        role,
        name,
        own.replicas,
        pool.surge if own.surge is None else own.surge,
        pool.num_cpus if own.num_cpus is None else own.num_cpus,
        pool.num_gpus if own.num_gpus is None else own.num_gpus,
        pool.resources if own.resources is None else own.resources,
        {**pool.engine, **own.engine},
        {**pool.worker, **own.worker},
    )


def role_of(home: Home) -> str:
    return home.partition("/")[0]


def placing(group: Group, ranks: int) -> dict[str, Any]:
    """What Serve reserves for a replica. Its ranks are processes of its own, not actors: all devices are in its one
    bundle, so that it sees them all (CUDA_VISIBLE_DEVICES), and each rank takes the one of its number.
    """
    options: dict[str, Any] = {
        "ray_actor_options": {
            "num_cpus": group.num_cpus,
            "num_gpus": group.num_gpus,
            "resources": dict(group.resources),
        }
    }
    together = {**group.resources, "CPU": group.num_cpus, "GPU": group.num_gpus}
    together = {name: amount for name, amount in together.items() if amount > 0}
    if ranks > 1 and together:
        options |= {"placement_group_bundles": [together], "placement_group_strategy": "STRICT_PACK"}
    return options


def too_few_gpus(group: Group, ranks: int, device: str) -> str | None:
    """Why Ray would give a replica's ranks fewer devices than they need; None: it would not. A replica that reserves no
    GPU sees none, and computes on CPU if it may.
    """
    if ranks == 1 or device == "cpu" or group.num_gpus >= ranks or (device == "auto" and not group.num_gpus):
        return None
    return (
        f"{group.path}.num_gpus is {group.num_gpus:g} and its engine.tensor_parallel is {ranks}: each rank needs a GPU "
        f"of its own; set num_gpus to {ranks}, lower tensor_parallel, or set engine.device to cpu"
    )
