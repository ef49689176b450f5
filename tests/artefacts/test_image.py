"""The image's files, put together as its Dockerfile says, can start every process that the manifests start.

Nothing is built here (test_image_built.py does). The COPY lines are carried out into an empty directory, the wheel is
what pyproject.toml takes of that, and an interpreter imports it that sees nothing else of the checkout.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.support import kube_tools

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
OPTIONAL = {"triton", "matplotlib", "flashinfer", "flash_attn", "vllm_flash_attn"}


def carry_out_copies(into: Path) -> None:
    """COPY lines from the build context; a directory as source means its content, as for docker."""
    ignored = shutil.ignore_patterns("__pycache__")
    for line in re.findall(r"^COPY (?!--)(.+)$", DOCKERFILE, re.MULTILINE):
        *sources, target = line.split()
        for source in (ROOT / name for name in sources):
            assert source.exists(), f"COPY {line}: there is no {source.relative_to(ROOT)}"
            if source.is_dir():
                shutil.copytree(source, into / target, dirs_exist_ok=True, ignore=ignored)
            else:
                shutil.copy(source, into / target / source.name if target.endswith("/") else into / target)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install --no-deps .` puts into the image's site-packages."""
    context, site = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("site")
    carry_out_copies(context)
    pyproject = tomllib.loads((context / "pyproject.toml").read_text())
    assert (context / pyproject["project"]["readme"]).exists()
    for package in pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert (context / package).is_dir(), f"the wheel takes {package}, which the image does not copy"
        shutil.copytree(context / package, site / Path(package).name)
    return site


def run(site: Path, code: str, *arguments: str) -> str:
    """Isolated, and without .pth files, one of which leads to the checkout."""
    start = f"import sys; sys.path += {[str(site), sysconfig.get_path('purelib')]!r}\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + code, *arguments],
        cwd=site, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


IMPORT_ALL = """
import importlib, json, pkgutil
site, failed, foreign = sys.argv[1], {}, []
for found in pkgutil.walk_packages([site]):
    if found.name.endswith("__main__"):
        continue  # a program; to be started
    try:
        module = importlib.import_module(found.name)
    except ImportError as error:
        failed[found.name] = (error.name or "").split(".")[0] or str(error)
        continue
    if not module.__file__.startswith(site):
        foreign.append(module.__file__)
print(json.dumps({"failed": failed, "foreign": foreign, "there": sorted(sys.modules)}))
"""

START = """
import runpy
programs, sys.argv[1:] = sys.argv[1:], ["--help"]
for name in programs:
    try:
        runpy.run_module(name, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (name, end.code)
from deploy.cli import main
main()
"""


def test_every_module_of_the_image_can_be_imported(installed: Path) -> None:
    seen = json.loads(run(installed, IMPORT_ALL, str(installed)).splitlines()[-1])
    assert {name: why for name, why in seen["failed"].items() if why not in OPTIONAL} == {}
    assert seen["foreign"] == []
    assert {"deploy.cli", "deploy.app", "engine.runner", "kv_transfer.nixl_transport"} <= set(seen["there"])


def test_the_programs_of_the_image_start(installed: Path) -> None:
    shown = run(installed, START, "router", "prefill_worker", "decode_worker")
    assert shown.count("--config CONFIG") >= 3
    assert "simulate" in shown, "the command `diptych`"


def test_the_dockerfile_has_no_known_fault() -> None:
    path = str(ROOT / "deploy/docker/Dockerfile")
    done = subprocess.run([kube_tools.hadolint(), path], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_is_not_root_and_installs_by_hash() -> None:
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE) == ["1000"]
    installed = re.findall(r"pip install (.+?)(?: \\$|$)", DOCKERFILE, re.MULTILINE)
    assert len(installed) == 4
    assert {one.split(" -r ")[0] for one in installed if "wheel" not in one} == {"--no-deps --require-hashes"}
    assert "libibverbs" not in re.sub(r"^#.*$", "", DOCKERFILE, flags=re.MULTILINE)
