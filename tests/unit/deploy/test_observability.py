"""Dashboards, alerts and docs/metrics.md say what the catalog says, and every alert has its page in the runbook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import promql_parser as promql
import pytest
import yaml

from deploy import generated
from deploy.generated import ROOT
from deploy.observability import __main__ as command
from deploy.observability.alerts import ALERTS
from deploy.observability.generate import files
from settings.telemetry.catalog import CATALOG

HERE = ROOT / "deploy/observability"
LABELS_OF = {name: set(m.prometheus_labels) for m in CATALOG for name in m.series}
OF_PROMETHEUS = {"up": {"job"}}  # that it makes itself
OF_TARGETS = {"instance", "job", "diptych_role"}


def check(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m deploy.observability --check`, as `make lint` calls it."""
    monkeypatch.setattr(sys, "argv", ["observability", "--check"])
    command.main()


def test_the_committed_files_are_what_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch)


def test_stale_and_missing_files_are_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *others = files()
    for name in (first, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / first).write_text("of last week")
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as end:
        check(monkeypatch)
    assert end.value.code == f"stale: {first}, {second}; run python -m deploy.observability"
    assert not (tmp_path / second).exists(), "a check writes nothing"


def _queries() -> Iterator[tuple[str, str]]:
    """(where, expression) of all committed dashboards and rules."""
    for path in sorted((HERE / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{path.name}: {panel['title']}", target["expr"]
    for group in yaml.safe_load((HERE / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def _names(expr: promql.Expr) -> tuple[set[str], set[str]]:
    """Series and labels that an expression names anywhere."""
    series: set[str] = set()
    labels: set[str] = set()

    def visit(node: promql.Expr) -> None:
        match node:
            case promql.VectorSelector():
                series.add(node.name or "")
                labels.update(matcher.name for matcher in node.matchers.matchers)
            case promql.MatrixSelector():
                visit(node.vector_selector)
            case promql.AggregateExpr():
                if node.modifier is not None:
                    labels.update(node.modifier.labels)
                visit(node.expr)
            case promql.BinaryExpr():
                visit(node.lhs)
                visit(node.rhs)
            case promql.Call():
                for argument in node.args:
                    visit(argument)
            case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
                visit(node.expr)
            case promql.NumberLiteral() | promql.StringLiteral():
                pass
            case _:
                raise AssertionError(f"{type(node).__name__} is new here")

    visit(expr)
    return series, labels


@pytest.mark.parametrize(("where", "expr"), [pytest.param(w, e, id=w) for w, e in _queries()])
def test_a_query_names_only_metrics_and_labels_that_exist(where: str, expr: str) -> None:
    series, labels = _names(promql.parse(expr))
    assert series
    known = LABELS_OF | OF_PROMETHEUS
    assert series <= known.keys(), f"{where}: no such metric"
    assert labels <= set().union(*(known[s] for s in series)) | OF_TARGETS | {"le"}, f"{where}: no such label"


def test_the_check_finds_what_is_wrong() -> None:
    series, labels = _names(promql.parse('sum by (rule) (rate(diptych_invented_total{colour="red"}[5m])) / on (x) up'))
    assert series == {"diptych_invented_total", "up"}
    assert {"rule", "colour"} <= labels


def test_every_metric_is_looked_at_somewhere() -> None:
    seen = set().union(*(_names(promql.parse(expr))[0] for _, expr in _queries()))
    assert [m.name for m in CATALOG if not seen & set(m.series) and m.name != "diptych.cost.per_million_tokens"] == []


def test_every_alert_has_a_page_in_the_runbook_and_the_other_way_round() -> None:
    headings = re.findall(r"^## (Diptych\w+)$", (ROOT / "docs/runbooks.md").read_text(), re.M)
    assert headings == [alert.name for alert in ALERTS]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_promtool_takes_rules_and_configuration(tmp_path: Path) -> None:
    for arguments in (["check", "rules", "alerts.yaml"], ["check", "config", "prometheus.yml"]):
        done = subprocess.run(["promtool", *arguments], cwd=HERE, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
