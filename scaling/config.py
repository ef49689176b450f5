"""The `scaling:` section of the cluster configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PoolBounds(BaseModel):
    """How far a pool may shrink and grow, all its groups together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: int = Field(default=1, ge=1, description="Never fewer workers, except for an idle cluster scaled to zero.")
    max: int | None = Field(default=None, ge=1, description="Never more workers; unset = what the budget allows.")
    group: str = Field(
        default="", description="Of a pool with groups, the one that grows and shrinks; the others stay as they are."
    )

    @model_validator(mode="after")
    def _ordered(self) -> PoolBounds:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max is {self.max} and min is {self.min}; raise max or lower min")
        return self


class ScalingConfig(BaseModel):
    """Both pools are sized together, within one budget. Off while `budget_gpus` is unset."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget_gpus: float | None = Field(
        default=None,
        gt=0,
        description="GPUs that all workers may hold together, standbys and draining ones included; unset = no scaling. "
        "A worker that reserves no GPU counts as one.",
    )
    dry_run: bool = Field(default=False, description="Decide and tell, but change nothing.")
    prefill: PoolBounds = PoolBounds()
    decode: PoolBounds = PoolBounds()
    standbys: int = Field(
        default=0, ge=0, description="Started workers without a role, ready within seconds. Pools come first."
    )
    interval_s: float = Field(default=5.0, gt=0, le=300, description="Time between decisions.")
    start_s: float = Field(default=60.0, gt=0, description="Time that a worker takes to start, until one was measured.")
    wake_s: float = Field(default=3.0, ge=0, description="Time that a standby takes to be of use.")
    shift_roles: bool = Field(
        default=True, description="Whether a worker may change its pool. It takes effect within one interval."
    )
    window_s: float = Field(default=120.0, gt=0, description="How far back the trend of the load is taken from.")
    warm_up_s: float = Field(default=20.0, ge=0, description="What a worker measures in its first seconds is not used.")
    margin: float = Field(
        default=0.2,
        ge=0,
        description="Spare capacity for chance, in standard deviations of the load of random arrivals.",
    )
    down_margin: float = Field(
        default=0.95, gt=0, le=1, description="Share of its capacity that a smaller pool may be loaded to."
    )
    hold_s: float | None = Field(
        default=None,
        ge=0,
        description="Time for which fewer workers must have been enough before one is removed; "
        "unset = half of the measured start time, and longer after a stop that came too early.",
    )
    itl_share: float = Field(
        default=0.8, gt=0, le=1, description="Share of the ITL target that a step of decodes alone may take."
    )
    hand_hold_s: float = Field(default=600.0, ge=0, description="Time for which a count that was set by hand is kept.")
    unschedulable_after_s: float = Field(
        default=30.0, gt=0, description="A worker that cannot be placed for this time is withdrawn."
    )
    retry_s: float = Field(
        default=120.0, gt=0, description="Time after which it is asked for again; doubles with every failure."
    )
    idle_s: float | None = Field(
        default=None, gt=0, description="Without any request for this time, scale to zero; unset = never."
    )

    @property
    def on(self) -> bool:
        return self.budget_gpus is not None

    @property
    def resizes(self) -> bool:
        return self.on and not self.dry_run


class ScalingError(ValueError):
    """A configuration that cannot be met; names the cause and the fix."""


def check(config: ScalingConfig, prefill_gpus: float, decode_gpus: float, first_gpus: float = 0.0) -> None:
    """Against what a worker of each pool holds, and all that the cluster starts with. Raises ScalingError."""
    if config.budget_gpus is None:
        return
    if config.resizes and first_gpus > config.budget_gpus + 1e-9:
        raise ScalingError(
            f"scaling.budget_gpus is {config.budget_gpus:g}, and the workers that the cluster starts with need "
            f"{first_gpus:g}; raise the budget or lower prefill.replicas, decode.replicas or standby.replicas"
        )
    least = config.prefill.min * prefill_gpus + config.decode.min * decode_gpus
    if least > config.budget_gpus:
        raise ScalingError(
            f"scaling.budget_gpus is {config.budget_gpus:g}, and the smallest pools ({config.prefill.min} prefill, "
            f"{config.decode.min} decode) need {least:g}; raise the budget or lower the pools' min"
        )
    standbys = config.standbys * max(prefill_gpus, decode_gpus)
    if least + standbys > config.budget_gpus:
        raise ScalingError(
            f"scaling.standbys is {config.standbys}, which leaves no room for the smallest pools in a budget of "
            f"{config.budget_gpus:g} GPUs; lower it or raise scaling.budget_gpus"
        )
    if config.shift_roles and prefill_gpus != decode_gpus:
        raise ScalingError(
            f"a prefill worker holds {prefill_gpus:g} GPUs and a decode worker {decode_gpus:g}, so none can take the "
            "other's role; set scaling.shift_roles to false, or the same num_gpus for both pools"
        )
