"""Writes the generated files anew; with --check, names those that differ from what is generated, and exits 1."""

from __future__ import annotations

from deploy.generated import run
from deploy.observability.generate import files


def main() -> None:
    run("deploy.observability", __doc__, files())


if __name__ == "__main__":
    main()
