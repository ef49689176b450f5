"""Renders the chart. `python -m tests.support.chart` writes deploy/chart/rendered anew (`make chart`)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.support import kube_tools, manifests

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "chart"
RENDERED = CHART / "rendered"
VALUES = sorted((CHART / "values").glob("*.yaml"))


def template(*values: Path, settings: Sequence[str] = (), name: str = "diptych") -> subprocess.CompletedProcess[str]:
    files = [argument for path in values for argument in ("--values", str(path))]
    more = [argument for setting in settings for argument in ("--set-json", setting)]
    command = [kube_tools.helm(), "template", name, str(CHART), "--namespace", "diptych", *files, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    done.stdout = re.sub(r"^# Source: .*\n", "", done.stdout, flags=re.MULTILINE)
    return done


def render(*values: Path, settings: Sequence[str] = ()) -> list[manifests.Object]:
    done = template(*values, settings=settings)
    assert done.returncode == 0, done.stderr
    return manifests.load(done.stdout)


def main() -> None:
    RENDERED.mkdir(exist_ok=True)
    for path in VALUES:
        done = template(path)
        if done.returncode != 0:
            raise SystemExit(f"{path.name}: {done.stderr}")
        (RENDERED / path.name).write_text(done.stdout)
        print(RENDERED / path.name)


if __name__ == "__main__":
    main()
