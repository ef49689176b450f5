"""`diptych certs` and `diptych keys` as a user meets them, and what a client reads from its environment."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from deploy.access import AccessError, access_from
from deploy.cli import app
from deploy.config import ClusterConfig
from router.access.keys import digest, read_keys
from settings.file import read_settings
from settings.security import SecurityConfig
from settings.tls import TlsError, Wiring


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_certs_makes_a_section_that_can_be_used_and_keeps_its_authorities(tmp_path: Path) -> None:
    directory = tmp_path / "tls"
    assert run("certs", directory, "--host", "llm.example.com").exit_code == 0
    security = read_settings(directory / "security.yaml", ClusterConfig).security
    for role in ("router", "worker"):
        assert Wiring(security, role).internal_authentication() == "mutual TLS and cluster secret"
    authority, certificate = (directory / n for n in ("internal-ca.crt", "router.crt"))
    before = authority.read_bytes(), certificate.read_bytes(), (directory / "cluster.secret").read_bytes()
    assert run("certs", directory).exit_code == 0
    assert authority.read_bytes() == before[0]
    assert certificate.read_bytes() != before[1]
    assert (directory / "cluster.secret").read_bytes() == before[2]
    (tmp_path / "file").write_text("")
    done = run("certs", tmp_path / "file" / "below")
    assert done.exit_code == 1
    assert "name a directory" in done.output


def test_files_that_do_not_fit_are_named_before_anything_listens(tmp_path: Path) -> None:
    run("certs", tmp_path)
    section = yaml.safe_load((tmp_path / "security.yaml").read_text())["security"]
    wrong = {"certificate": str(tmp_path / "router.crt"), "key": str(tmp_path / "worker.key")}
    for changes, words in (
        ({"internal_tls": {**section["internal_tls"], "router": wrong}}, "do not belong together"),
        ({"internal_tls": {**section["internal_tls"], "router": None}}, "internal_tls.router is not set"),
        ({"public_tls": {"certificate": "/no/such", "key": "/no/such"}}, "No such file"),
        ({"cluster_secret": "/no/such"}, "No such file"),
    ):
        with pytest.raises(TlsError, match=words):
            Wiring(SecurityConfig.model_validate({**section, **changes}), "router")


def test_keys_are_shown_once_and_listed_and_revoked(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    done = run("keys", "add", path, "--tenant", "acme", "--requests-per-minute", 60, "--expires", "90d", "--model", "m")
    assert done.exit_code == 0
    (entry,) = read_keys(path).keys
    key = done.stdout.strip()
    assert digest(key) == entry.sha256
    assert key not in path.read_text()
    assert run("keys", "add", path, "--tenant", "ops", "--admin").exit_code == 0
    listed = run("keys", "list", path).stdout
    assert entry.id in listed
    assert "acme" in listed
    assert entry.sha256 not in listed
    assert run("keys", "revoke", path, entry.id).exit_code == 0
    assert [e.tenant for e in read_keys(path).keys] == ["ops"]
    for bad in (
        ("revoke", path, entry.id), ("add", path, "--tenant", "a b"),
        ("add", path, "--tenant", "a", "--expires", "soon"),
        ("list", tmp_path / "nothing.yaml"),
    ):  # fmt: skip
        done = run("keys", *bad)
        assert done.exit_code == 1
        assert "error:" in done.output
    assert len(read_keys(path).keys) == 1


def test_a_client_reads_its_environment(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("dpt_abc_def\n")
    access = access_from({"DIPTYCH_API_KEY_FILE": str(tmp_path / "key")})
    assert access.api_key == "dpt_abc_def"
    assert "dpt_abc_def" not in repr(access)
    assert access_from({"DIPTYCH_API_KEY": "k", "DIPTYCH_API_KEY_FILE": str(tmp_path / "key")}).api_key == "k"
    assert access_from({}).api_key == ""
    for bad in ({"DIPTYCH_CA": "/no/such"}, {"DIPTYCH_API_KEY": "a\nb"}, {"DIPTYCH_API_KEY": "ä"}):
        with pytest.raises(AccessError):
            access_from(bad)
