"""The image, built from its Dockerfile, and what it does: as its user, who is nobody, on a root that cannot be
written, without a network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import version

import pytest

from tests.support.image import Image

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

# A cluster of one worker, an answer, and an end that loses nothing.
CLUSTER = """
diptych up --no-ray --prefill 0 --decode 1 --timeout 800 > /tmp/up 2>&1 &
until grep -q "^ready" /tmp/up; do kill -0 $! || break; sleep 0.2; done
diptych generate "Say hello" --max-tokens 8 && kill -TERM $! && wait $!
code=$?
cat /tmp/up >&2
exit $code
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    made = Image(tmp_path_factory.mktemp("image"))
    try:
        made.build()
        yield made
    finally:
        made.close()


def out_of(image: Image, command: str, timeout_s: float = 300.0) -> str:
    done = image.run(command, timeout_s)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_it_says_what_it_is(image: Image) -> None:
    assert out_of(image, "diptych --version").startswith(f"diptych {version('diptych')}, protocol ")


def test_it_runs_as_nobody_who_can_change_it(image: Image) -> None:
    assert image.config["User"] == "1000"
    assert out_of(image, "id -u").strip() == "1000"
    status = out_of(image, "cat /proc/self/status")
    assert re.search(r"CapEff:\s+0+$", status, re.MULTILINE)
    assert image.run("touch /opt/diptych/x").returncode != 0
    mine = out_of(image, "find / -xdev -user 1000 -not -path '/home/ray*' -not -path '/proc/*' 2>/dev/null || true")
    assert mine.strip() == ""


def test_nothing_lies_beside_nixl_that_breaks_it(image: Image) -> None:
    """Debian's libibverbs makes every process that had an agent crash at its end."""
    found = out_of(image, "find / -xdev -name 'libibverbs*' -o -xdev -name 'libnl-route*' 2>/dev/null || true").split()
    assert [path for path in found if "site-packages" not in path] == []
    agent = "nixl_agent('one', nixl_agent_config(enable_prog_thread=False))"
    module = "nixl_cu12" if image.variant == "cpu" else "nixl_cu13"
    out_of(image, f'python -c "from {module}._api import *; one = {agent}"')


def test_torch_is_of_its_variant(image: Image) -> None:
    cuda = out_of(image, 'python -c "import torch; print(torch.version.cuda)"').strip()
    assert (cuda == "None") is (image.variant == "cpu")


@pytest.fixture
def with_model(image: Image) -> Image:
    if image.variant != "cpu":
        pytest.skip("only the variant for CPUs brings a model")
    return image


def test_the_model_that_it_brings_is_served(with_model: Image) -> None:
    """By our own kernels: a compiler is there, and a place for what it makes."""
    told = json.loads(out_of(with_model, "diptych check embedded --json", 900))
    assert told["served"] is True
    assert "native" in json.dumps(told)


def test_a_cluster_answers_and_leaves(with_model: Image) -> None:
    assert out_of(with_model, CLUSTER, 900).strip()
