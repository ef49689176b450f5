"""What of the chart is generated: values.schema.json from the settings classes, the rest from deploy/observability.

`python -m deploy.chart_files` writes it; with --check it names what differs, and exits 1.
"""

from __future__ import annotations

import json
from pathlib import Path

from deploy.chart_values import schema
from deploy.generated import ROOT, run
from deploy.observability.generate import files as observability_files

CHART = "deploy/chart"


def files() -> dict[str, str]:
    """By path from the repository's root."""
    made = {f"{CHART}/values.schema.json": json.dumps(schema(), indent=1) + "\n"}
    for path, content in observability_files().items():
        name = Path(path).name
        if name == "alerts.yaml":
            made[f"{CHART}/files/alerts.yaml"] = content.partition("\n")[2]  # without the line on where it comes from
        elif path.endswith(".json"):
            made[f"{CHART}/files/dashboards/{name}"] = content
    collector = (ROOT / "deploy/observability/otel-collector.yaml").read_text()
    made[f"{CHART}/files/otel-collector.yaml"] = collector
    return made


if __name__ == "__main__":
    run("deploy.chart_files", __doc__, files())
