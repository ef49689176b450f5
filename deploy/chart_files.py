"""What of the chart is generated: values.schema.json from the settings classes, the rest from deploy/observability.

`python -m deploy.chart_files` writes it; with --check it names what differs, and exits 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deploy.chart_values import schema
from deploy.observability.generate import files as observability_files

ROOT = Path(__file__).resolve().parents[1]
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


def stale(root: Path = ROOT) -> list[str]:
    """Those that are not in `root` as they are generated."""
    return [
        name for name, content in files().items() if not (root / name).exists() or (root / name).read_text() != content
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.chart_files", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and name the files that are stale")
    if parser.parse_args().check:
        if names := stale():
            sys.exit(f"stale: {', '.join(names)}; run python -m deploy.chart_files")
        return
    for name, content in files().items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        print(name)


if __name__ == "__main__":
    main()
