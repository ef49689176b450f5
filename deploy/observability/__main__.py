"""Writes the generated files anew. A test compares them with what is committed."""

from __future__ import annotations

from pathlib import Path

from deploy.observability.generate import ROOT, files


def main() -> None:
    for name, content in files().items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
