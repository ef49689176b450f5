"""What may listen where, and what the cluster secret says."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml

from deploy.certificates import make_all, security_section
from settings.secret import ClusterSecret, SecretError
from settings.security import InternalTls, PublicTls, SecurityConfig, is_loopback
from settings.tls import Wiring

TLS = PublicTls(certificate="c", key="k")
INTERNAL = InternalTls(ca="ca")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert not SecurityConfig().exposed([("router.host", host, "public")])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", "", "127.0.0.1.example.com"])
def test_other_hosts_need_tls_and_authentication_or_a_word(host: str) -> None:
    assert not is_loopback(host)
    public, internal = ("router.host", host, "public"), ("worker.host", host, "internal")
    (problem,) = SecurityConfig().exposed([public])
    assert "security.public_tls and security.api_keys" in problem
    assert "insecure_ok" in problem
    (problem,) = SecurityConfig(api_keys="k").exposed([public])
    assert "api_keys" not in problem
    assert not SecurityConfig(public_tls=TLS, api_keys="k").exposed([public])
    assert not SecurityConfig(public_tls=TLS.model_copy(update={"client_ca": "c"})).exposed([public])
    assert SecurityConfig(public_tls=TLS, api_keys="k").exposed([internal])
    assert not SecurityConfig(internal_tls=INTERNAL).exposed([internal])
    assert not SecurityConfig(insecure_ok=True).exposed([public, internal])


def write(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines))
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


OLD, NEW = "o" * 40, "n" * 40


def test_proofs_of_membership(tmp_path: Path) -> None:
    write(tmp_path / "secret", OLD)
    secret = ClusterSecret(str(tmp_path / "secret"))
    proof = secret.proof("worker", 1000.0)
    assert secret.check_proof(proof, ("worker",), 1000.0) == ""
    assert secret.check_proof(proof, ("router", "worker"), 1100.0) == ""
    assert "router was expected" in secret.check_proof(proof, ("router",), 1000.0)
    assert "expired" in secret.check_proof(proof, ("worker",), 1200.0)
    assert secret.check_proof(proof, ("worker",), 890.0) == "", "clocks may differ by two minutes"
    assert "in the future" in secret.check_proof(proof, ("worker",), 870.0)
    assert "in the future" in secret.check_proof(secret.proof("worker", 1e9), ("worker",), 1000.0)
    for bad in ("", "x", proof.replace("worker", "router"), proof[:-2], proof + "00", "worker.9999999999.zz",
                "worker.99999999999999999999999." + "0" * 64, "worker.١.00"):  # fmt: skip
        assert secret.check_proof(bad, ("router", "worker"), 1000.0)
    assert OLD not in repr(secret)


def test_a_secret_is_changed_in_steps(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write(path, OLD)
    ahead = ClusterSecret(str(path))
    signed_old = ahead.sign(b"p", b"m")
    write(path, NEW, OLD)
    both = ClusterSecret(str(path))
    assert both.verify(b"p", b"m", signed_old)
    assert not ahead.verify(b"p", b"m", both.sign(b"p", b"m"))
    ahead._looked = -1e9
    assert ahead.verify(b"p", b"m", both.sign(b"p", b"m")), "the file is followed"
    path.write_text("short")
    ahead._looked = -1e9
    assert ahead.verify(b"p", b"m", signed_old), "the last good content stays"
    assert "32 characters" in ahead.problem
    assert "short" not in ahead.problem


def test_a_secret_that_cannot_be_one(tmp_path: Path) -> None:
    write(tmp_path / "secret", "hunter2")
    with pytest.raises(SecretError) as caught:
        ClusterSecret(str(tmp_path / "secret"))
    assert "hunter2" not in str(caught.value)
    with pytest.raises(SecretError, match="diptych certs"):
        ClusterSecret(str(tmp_path / "nothing"))


def test_when_certificates_end(tmp_path: Path) -> None:
    """Of the files in use: new ones are seen, broken ones leave the old in use."""
    make_all(tmp_path, [], 3)
    config = SecurityConfig.model_validate(yaml.safe_load(security_section(tmp_path))["security"])
    assert Wiring(SecurityConfig(), "router").expiries() == {}
    router, worker = Wiring(config, "router"), Wiring(config, "worker")
    assert router.expiries() == pytest.approx(dict.fromkeys(("public", "internal"), time.time() + 3 * 86400), abs=60)
    assert worker.expiries().keys() == {"internal"}
    make_all(tmp_path, [], 9)
    assert router.expiries() == pytest.approx(dict.fromkeys(("public", "internal"), time.time() + 9 * 86400), abs=60)
    write(tmp_path / "public.crt", "nothing")
    assert router.expiries()["public"] == pytest.approx(time.time() + 9 * 86400, abs=60)


def test_secrets_that_others_may_read_are_complained_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "secret", OLD)
    (tmp_path / "secret").chmod(0o640)
    ClusterSecret(str(tmp_path / "secret"))
    assert not caplog.records
    (tmp_path / "secret").chmod(0o644)
    ClusterSecret(str(tmp_path / "secret"))
    assert "chmod 600" in caplog.text
    assert OLD not in caplog.text
