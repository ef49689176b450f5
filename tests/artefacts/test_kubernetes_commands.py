"""Every command of what the README and docs/kubernetes.md say about Kubernetes: carried out where it can be without a
cluster, else held against what it names. One that is not known here fails.
"""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deploy.cli import app
from tests.support import chart, manifests

ROOT = chart.ROOT
KIND = chart.CHART / "values" / "kind.yaml"


def commands() -> list[list[str]]:
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("\n## Kubernetes") :]
    section = section[: section.index("\n## ", 1)]
    text = section + (ROOT / "docs/kubernetes.md").read_text() + (ROOT / "docs/sizing.md").read_text()
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    shown = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    shown += re.findall(r"`(kubectl -n [^`]+)`", text)
    words = [
        shlex.split(line, comments=True) for line in shown if re.match(r"(docker|helm|kubectl|diptych|python) ", line)
    ]
    return [part for line in words for part in _parts(line)]


def _parts(words: list[str]) -> list[list[str]]:
    """At && and ;"""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "&&" or word.endswith(";"):
            parts[-1] += [word[:-1]] if word.endswith(";") and word != ";" else []
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def options(words: list[str], *names: str) -> list[str]:
    return [value for name, value in itertools.pairwise(words) if name in names]


@functools.cache
def rendered() -> list[manifests.Object]:
    return [*chart.render(KIND), *chart.render()]


def pods() -> list[dict[str, Any]]:
    return [pod for thing in rendered() for _, pod in manifests.pod_templates(thing)]


def helm(words: list[str]) -> None:
    if "kuberay/kuberay-operator" in words:
        return  # not ours
    if words[:2] in (["helm", "install"], ["helm", "template"]):
        files = [ROOT / name for name in options(words, "-f")]
        assert words[3] == "deploy/chart"
        assert chart.template(*[one for one in files if one.name not in ("values.yaml", "yours.yaml")]).returncode == 0
    else:
        assert words == ["helm", "-n", "diptych", "test", "diptych"]
        (test,) = [t for t in chart.render(KIND) if t["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"]
        assert test["spec"]["containers"][0]["command"][:2] == ["diptych", "health"]


def kubectl(words: list[str]) -> None:
    if words[3:6] == ["create", "secret", "generic"]:
        assert words[6] in {*SECRETS}
        return
    for selector in options(words, "-l"):
        wanted = dict(pair.split("=") for pair in selector.split(","))
        assert any(wanted.items() <= pod["metadata"]["labels"].items() for pod in pods()), selector
    for column in ",".join(options(words, "-L")).split(","):
        serving = [labels for labels in (pod["metadata"]["labels"] for pod in pods()) if _serves(labels)]
        assert not column or all(column in labels for labels in serving), column
    if "exec" in words:
        deployments = [f"deploy/{t['metadata']['name']}" for t in rendered() if t["kind"] == "Deployment"]
        assert words[words.index("exec") + 1] in deployments
        diptych(words[words.index("--") + 1 :])
    if "port-forward" in words:
        at = words.index("port-forward")
        services = {t["metadata"]["name"]: t["spec"]["ports"] for t in rendered() if t["kind"] == "Service"}
        ports = {str(port["port"]) for port in services[words[at + 1].removeprefix("svc/")]}
        assert set(words[at + 2 :]) <= ports


def _serves(labels: dict[str, str]) -> bool:
    return labels.get("diptych.dev/role") in ("router", "prefill", "decode", "standby")


def docker(words: list[str]) -> None:
    (file,), (tag,) = options(words, "-f"), options(words, "-t")
    declared = set(re.findall(r"^ARG (\w+)", (ROOT / file).read_text(), re.MULTILINE))
    assert {one.partition("=")[0] for one in options(words, "--build-arg")} <= declared
    images = {one["image"] for pod in pods() for one in pod["spec"]["containers"]}
    assert tag in images, "what is built is what the chart takes"


def diptych(words: list[str]) -> None:
    """`certs` and `keys` are carried out below, what asks a cluster in tests/cluster/test_commands.py."""
    assert words[1] in {"status", "generate", "plan", "certs", "keys"}
    shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"}).output
    for word in words[2:]:
        assert not word.startswith("--") or word in shown or words[1] == "keys", word


KNOWN: dict[str, Callable[[list[str]], None]] = {"helm": helm, "kubectl": kubectl, "docker": docker, "diptych": diptych}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_names_what_there_is(words: list[str]) -> None:
    KNOWN[words[0]](words)


# Secrets: made as the document says, and whole.

SECRETS = {
    one[6]: [value.removeprefix("--from-file=") for value in one[7:]]
    for one in commands()
    if one[3:6] == ["create", "secret", "generic"]
}


def test_the_secrets_that_are_made_are_those_that_pods_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [words for words in commands() if words[:2] in (["diptych", "certs"], ["diptych", "keys"])]
    assert [words[1] for words in made] == ["certs", "keys"]
    for words in made:
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
    for files in SECRETS.values():
        assert [name for name in files if not (tmp_path / name).exists()] == []
    held = {name: {Path(file).name for file in files} for name, files in SECRETS.items()}
    mounted: dict[str, set[str]] = {}
    for thing in chart.render():
        for _, pod in manifests.pod_templates(thing):
            for volume in pod["spec"].get("volumes", []):
                for source in volume.get("projected", {}).get("sources", []):
                    if "secret" in source:
                        keys = {item["key"] for item in source["secret"].get("items", [])}
                        mounted.setdefault(source["secret"]["name"], set()).update(keys)
    assert set(mounted) == set(held)
    for name, keys in mounted.items():
        assert keys <= held[name]
    security = next(t["data"]["security.yaml"] for t in chart.render() if "security.yaml" in t.get("data", {}))
    named = set(re.findall(r"/etc/diptych/security/([\w.-]+)", yaml.safe_dump(yaml.safe_load(security))))
    assert named - {"security.yaml"} <= set().union(*held.values())
