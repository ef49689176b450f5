"""Files that are generated and committed: written anew, or compared with what they would be."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def stale(files: Mapping[str, str], root: Path = ROOT) -> list[str]:
    """Those that are not in `root` as they are generated. `files`: contents, by path from the repository's root."""

    def there(path: Path) -> str | None:
        return path.read_text() if path.exists() else None

    return [name for name, content in files.items() if there(root / name) != content]


def run(module: str, description: str | None, files: Mapping[str, str]) -> None:
    """The command `python -m MODULE [--check]`."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and name the files that are stale")
    if parser.parse_args().check:
        if names := stale(files, ROOT):
            sys.exit(f"stale: {', '.join(names)}; run python -m {module}")
        return
    for name, content in files.items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
