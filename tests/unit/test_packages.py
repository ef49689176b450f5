"""Every list of packages names the same ones, and every requirement is in the lists that are installed from."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.unit.test_imports import ALLOWED

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WHEEL = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
# Chosen at run time where they are, done without where they are not. Each import has its `except ImportError`.
OPTIONAL = {"triton", "matplotlib", "flashinfer", "flash_attn", "vllm_flash_attn"}


def test_every_package_is_in_the_wheel_and_in_the_rule_of_imports() -> None:
    there = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks"}  # not shipped
    assert {*there, "proto/diptych"} == set(WHEEL)
    assert there == set(ALLOWED)


def test_the_image_copies_what_the_wheel_is_built_from() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "deploy/docker/Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names == {"requirements", "pyproject.toml", "README.md", "proto", *WHEEL} - {"proto/diptych"}


def imported() -> Iterator[tuple[str, str]]:
    """Everything that the product imports, wherever in a file: the name's first part, and the file."""
    for package in WHEEL:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    yield from ((alias.name.split(".")[0], str(path.relative_to(ROOT))) for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    yield (node.module or "").split(".")[0], str(path.relative_to(ROOT))


def names(requirements: list[str]) -> set[str]:
    lines = [line for line in requirements if line.strip() and not line.startswith("#")]
    return {re.split(r"[\[<>=~! ;]", line.strip())[0].lower().replace("_", "-") for line in lines}


def pinned(*files: str) -> set[str]:
    return names([line for f in files for line in (ROOT / "requirements" / f"{f}.txt").read_text().splitlines()])


def test_what_the_product_imports_is_declared() -> None:
    declared = names(PYPROJECT["project"]["dependencies"]) | pinned("nixl") | {"pydantic-core"}  # a part of pydantic
    owners = packages_distributions()
    ours = {Path(package).name for package in WHEEL}
    undeclared = {}
    for top, where in imported():
        if top not in sys.stdlib_module_names and top not in ours | OPTIONAL:
            found = {name.lower().replace("_", "-") for name in owners.get(top, [])}
            if not found & declared:
                undeclared[where] = (top, found)
    assert undeclared == {}


def test_what_is_declared_is_pinned() -> None:
    """The image and `make setup` install from the pins alone, the package itself with --no-deps."""
    assert names(PYPROJECT["project"]["dependencies"]) <= pinned("torch", "base")
    assert names(PYPROJECT["project"]["optional-dependencies"]["dev"]) <= pinned("dev")


def locked(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    return {line.partition("==")[0]: line.partition("==")[2] for line in lines}


def pins(*files: str) -> Iterator[tuple[str, str]]:
    for name in files:
        for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines():
            if line and not line.startswith("#"):
                package, _, number = line.partition("==")
                yield package.partition("[")[0].lower().replace("_", "-"), number


def test_the_locks_of_the_image_have_the_pins_with_hashes() -> None:
    """`make lock` writes them."""
    for lock, files in (
        ("lock", ("torch", "base", "nixl", "triton")),
        ("lock-gpu", ("torch", "base")),
        ("lock-build", ("build",)),
    ):
        found = locked(lock)
        for package, number in pins(*files):
            assert found[package].split()[0] == number, f"{package}: run make lock"


def test_with_and_without_gpus_the_image_has_the_same_packages_but_for_torch_and_what_it_brings() -> None:
    cpu, gpu = locked("lock"), locked("lock-gpu")
    assert {name for name in cpu if gpu.get(name) != cpu[name]} == {"torch", "triton", "nixl-cu12"}
    more = set(gpu) - set(cpu)
    assert {name for name in more if not re.match("nvidia-|cuda-", name)} == {"nixl-cu13"}
    (cudnn,) = [name for name in more if name.startswith("nvidia-cudnn-cu")]
    assert f"nixl-cu{cudnn.rpartition('cu')[2]}" in gpu, "NIXL for torch's CUDA"
    assert gpu["nixl-cu13"].split()[0] == cpu["nixl-cu12"].split()[0]
