"""The chart's values against their schema and our settings classes, without Helm."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from deploy.chart_files import files
from deploy.chart_values import OF_THE_CHART, ChartValues, cluster_of, schema
from deploy.config import ClusterConfig
from deploy.generated import stale
from settings.file import validate_settings

CHART = Path(__file__).resolve().parents[3] / "deploy" / "chart"
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
FILES = sorted((CHART / "values").glob("*.yaml"))


def merged(over: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
    """As Helm does it: maps are merged, null takes a key away, all else is replaced."""
    made = copy.deepcopy(under)
    for key, value in over.items():
        if value is None:
            made.pop(key, None)
            continue
        both = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = merged(value, made[key]) if both else value
    return made


def test_the_generated_files_are_current() -> None:
    assert stale(files()) == []
    assert len(files()) == 6


@pytest.mark.parametrize("path", [CHART / "values.yaml", *FILES], ids=lambda path: path.stem)
def test_values_fit_schema_classes_and_loader(path: Path) -> None:
    values = merged(yaml.safe_load(path.read_text()), DEFAULTS)
    jsonschema.Draft7Validator(schema()).validate(values)
    ChartValues.model_validate(values)
    validate_settings(cluster_of(values), ClusterConfig, str(path))


def test_values_yaml_has_every_key_of_the_chart_itself() -> None:
    """So that whoever reads it has seen all."""

    def missing(model: type[BaseModel], there: dict[str, Any], path: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            if name not in there:
                found.append(f"{path}{name}")
            elif (
                isinstance(field.annotation, type)
                and issubclass(field.annotation, BaseModel)
                and name not in ("pod", "limits")
            ):
                found += missing(field.annotation, there[name], f"{path}{name}.")
        return found

    assert missing(ChartValues, DEFAULTS, "") == []


def test_what_the_chart_decides_is_refused_and_all_else_is_known() -> None:
    validator = jsonschema.Draft7Validator(schema())
    for path in OF_THE_CHART:
        *sections, key = path.split(".")
        part: Any = "x"
        for name in reversed([*sections, key]):
            part = {name: part}
        assert list(validator.iter_errors({"cluster": part})), path
    everything = ClusterConfig().model_dump(mode="json")
    for path in OF_THE_CHART:
        *sections, key = path.split(".")
        owner = everything
        for name in sections:
            owner = owner[name]
        owner.pop(key)
    validator.validate({"cluster": everything})


@pytest.mark.parametrize(
    "cluster",
    [
        {"engine": {"pin_threads": 3, "async_scheduling": True}},
        {"engine": {"num_blocks": None}},
        {"scaling": {"budget_gpus": 4}},
    ],
)
def test_what_the_loader_takes_the_schema_takes(cluster: dict[str, Any]) -> None:
    jsonschema.Draft7Validator(schema()).validate({"cluster": cluster})
