"""Writes the generated files anew; with --check, names those that differ from what is generated, and exits 1."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.observability.generate import ROOT, files, stale


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.observability", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and name the files that are stale")
    if parser.parse_args().check:
        if names := stale(ROOT):
            sys.exit(f"stale: {', '.join(names)}; run python -m deploy.observability")
        return
    for name, content in files().items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
