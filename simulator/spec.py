"""What is simulated: workers, links, targets. The cluster file of `diptych simulate` is this, as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from simulator.cost_model import CostModel, CostModelError, load, preset, with_schemes


class PoolSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(ge=0)
    cost_model: str = Field(default="", description="Of these workers, if they are not as the cluster's: their degree.")
    nic_gbytes_per_s: float | None = Field(default=None, gt=0, description="Unset = the cluster's.")
    max_batch_tokens: int = Field(default=2048, ge=1, description="Token budget of one step.")
    max_running_sequences: int = Field(default=256, ge=1)
    adaptive_chunks: bool = Field(
        default=True, description="Keep steps with decodes in them within the ITL target (engine/chunk_budget.py)."
    )


class ClusterSpec(BaseModel):
    """The workers of a pool are alike; the pools may differ in device and degree."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cost_model: str = Field(
        default="h200-8b", description="A preset, or a cost-model file, looked for beside this one."
    )
    prefill: PoolSpec = PoolSpec(workers=2, max_batch_tokens=8192)
    decode: PoolSpec = PoolSpec(workers=6)
    gpus_per_worker: int = Field(default=1, ge=1, description="For what it costs; the cost model has their speed.")
    kv_capacity_tokens: int | None = Field(default=None, ge=1024, description="Per worker; unset = the cost model's.")
    nic_gbytes_per_s: float = Field(default=25.0, gt=0, description="Of each worker, each way.")
    handoff_ms: float = Field(default=3.0, ge=0, description="From the last byte to a decode step, beside waiting.")
    router_ms: float = Field(default=1.0, ge=0, description="From the client to a worker's queue.")
    report_every_s: float = Field(default=0.25, gt=0, description="How old the router's view of a worker may be.")
    ttft_base_s: float = Field(default=1.0, ge=0)
    ttft_isolated_factor: float = Field(default=2.0, ge=0, description="TTFT target: base + factor x isolated time.")
    itl_target_ms: float = Field(default=50.0, gt=0)
    overload: Literal["put_back", "arrival"] = Field(
        default="put_back", description="As `router.overload`: prompts by due date, or first come, first served."
    )
    overload_protect: float = Field(default=0.5, ge=0, le=1, description="As `router.overload_protect`.")
    requests_per_s: float | None = Field(default=None, gt=0, description="Of the whole cluster; unset = the trace's.")
    fidelity: Literal["fast", "exact"] = "fast"

    @field_validator("decode")
    @classmethod
    def _somebody_decodes(cls, pool: PoolSpec) -> PoolSpec:
        if pool.workers < 1:
            raise ValueError("workers is 0, and nothing answers without a decode worker; set at least 1")
        return pool

    def beside(self, file: Path) -> ClusterSpec:
        """The same, its cost-model file (if it names one) looked for where the cluster file lies."""
        if not self._names_a_file:
            return self
        return self.model_copy(update={"cost_model": str(file.parent / self.cost_model)})

    def with_schemes(self, schemes: str) -> ClusterSpec:
        """Workers of the same presets whose numbers are rounded: "int8", "kv8", "int4-kv8". Raises CostModelError."""
        if self._names_a_file:
            raise CostModelError("a measured cost model is of one scheme; this needs a preset, such as h200-8b")
        pools = {
            role: pool.model_copy(update={"cost_model": with_schemes(pool.cost_model, schemes)})
            for role, pool in (("prefill", self.prefill), ("decode", self.decode))
            if pool.cost_model
        }
        return self.model_copy(update={**pools, "cost_model": with_schemes(self.cost_model, schemes)})

    @property
    def _names_a_file(self) -> bool:
        return "/" in self.cost_model or "." in self.cost_model

    def costs(self) -> CostModel:
        """Raises CostModelError."""
        return load(Path(self.cost_model)) if self._names_a_file else preset(self.cost_model)

    def costs_of(self, pool: PoolSpec, costs: CostModel) -> CostModel:
        """`costs` are the cluster's. Raises CostModelError."""
        if not pool.cost_model:
            return costs
        own = preset(pool.cost_model)
        if own.kv_bytes_per_token != costs.kv_bytes_per_token:
            raise CostModelError(f"{own.name} and {costs.name} are of two models; pools serve the same one")
        return own

    @model_validator(mode="after")
    def _exact_workers_are_alike(self) -> ClusterSpec:
        if self.fidelity == "exact" and (self.prefill.cost_model or self.decode.cost_model):
            raise ValueError("a pool has a cost_model of its own, which only `fidelity: fast` simulates")
        return self
