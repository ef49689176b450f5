"""A plan as values of the chart."""

from __future__ import annotations

import jsonschema
import pytest
import yaml

from deploy.chart_values import ChartValues, cluster_of, schema
from deploy.config import ClusterConfig
from deploy.plan_values import as_yaml
from settings.file import validate_settings
from simulator.planner import Bill, PoolPlan
from simulator.spec import ClusterSpec
from tests.unit.deploy.test_chart_values import DEFAULTS, merged

BILL = Bill(2, 16, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("prefill", [0, 3])
def test_the_chart_takes_a_plan(prefill: int) -> None:
    text = as_yaml(PoolPlan(prefill, 8 - prefill, 12.3, 0.4, 0.1), BILL, ClusterSpec(gpus_per_worker=2), ["A word."])
    assert text.startswith(
        f"# Pools by `diptych plan`: 2 releases, each with {prefill} prefill and {8 - prefill} decode"
    )
    assert "# A word.\n" in text
    values = merged(yaml.safe_load(text), DEFAULTS)
    jsonschema.Draft7Validator(schema()).validate(values)
    ChartValues.model_validate(values)
    config = validate_settings(cluster_of(values), ClusterConfig, "a plan")
    assert (config.prefill.replicas, config.decode.replicas) == (prefill, 8 - prefill)
    assert config.decode.num_gpus == 2
    assert config.router.itl_target_ms == ClusterSpec().itl_target_ms
    for role in ("prefill", "decode"):
        config.worker_settings(role)
