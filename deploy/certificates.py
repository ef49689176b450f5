"""`diptych certs DIR`: a private authority, certificates and a cluster secret, for trying out and for small clusters.

    internal-ca.crt  router.crt router.key  worker.crt worker.key     inside the cluster, mutual
    public-ca.crt    public.crt public.key                            the router's public ports
    client.crt client.key                                             for public_tls.client_ca = public-ca.crt
    cluster.secret   security.yaml                                    the section that names all of them

The authorities' keys (*-ca.key) sign new certificates and are needed by no process: keep them elsewhere. Where there is
an authority already (cert-manager, SPIFFE), use that one: what counts are the names in router.crt and worker.crt.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from settings.tls import role_name

_SKEW = datetime.timedelta(minutes=5)


class CertificatesError(Exception):
    """Names cause and fix."""


class Authority:
    """Signs with ECDSA P-256."""

    def __init__(self, name: str, directory: Path, days: float) -> None:
        self._directory = directory
        self._days = days
        paths = directory / f"{name}.crt", directory / f"{name}.key"
        if all(path.exists() for path in paths):
            self._certificate = x509.load_pem_x509_certificate(paths[0].read_bytes())
            key = serialization.load_pem_private_key(paths[1].read_bytes(), None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise CertificatesError(f"{paths[1]} was not made here; name an empty directory")
            self._key = key
            return
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Diptych {name}")])
        self._certificate = (
            _builder(subject, subject, self._key, 10 * days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        _write(paths[0], self._certificate.public_bytes(serialization.Encoding.PEM), secret=False)
        _write(paths[1], _pem(self._key), secret=True)

    def issue(self, name: str, hosts: Sequence[str], *, days: float | None = None) -> None:
        """`name`.crt and `name`.key; the last replaces an older one. Negative `days`: expired (for tests)."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        certificate = (
            _builder(subject, self._certificate.subject, key, self._days if days is None else days)
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        _write(self._directory / f"{name}.key", _pem(key), secret=True)
        _write(self._directory / f"{name}.crt", certificate.public_bytes(serialization.Encoding.PEM), secret=False)


def make_all(directory: Path, hosts: Sequence[str], days: float) -> list[Path]:
    """Authorities that are there are kept, certificates made anew. Returns what is there. Raises CertificatesError."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        public_hosts = list(dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"]))
        internal = Authority("internal-ca", directory, days)
        internal.issue("router", [role_name("router")])
        internal.issue("worker", [role_name("worker")])
        public = Authority("public-ca", directory, days)
        public.issue("public", public_hosts)
        public.issue("client", ["client"])
        secret = directory / "cluster.secret"
        if not secret.exists():
            _write(secret, secrets.token_urlsafe(48).encode() + b"\n", secret=True)
        _write(directory / "security.yaml", security_section(directory).encode(), secret=False)
    except (OSError, ValueError) as error:
        raise CertificatesError(f"{directory}: {error}; name a directory that can be written") from None
    return sorted(path for path in directory.iterdir() if path.suffix in (".crt", ".key", ".secret", ".yaml"))


def security_section(directory: Path) -> str:
    at = directory.resolve()
    return f"""security:
  public_tls: {{certificate: {at}/public.crt, key: {at}/public.key}}
  internal_tls:
    ca: {at}/internal-ca.crt
    router: {{certificate: {at}/router.crt, key: {at}/router.key}}
    worker: {{certificate: {at}/worker.crt, key: {at}/worker.key}}
  cluster_secret: {at}/cluster.secret
  # api_keys: {at}/keys.yaml      # diptych keys add {at}/keys.yaml --tenant NAME
"""


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _SKEW)
        .not_valid_after(end)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=signs, crl_sign=signs, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, *, secret: bool) -> None:
    """Whole or not at all, and a secret is never readable by others, not even for a moment."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
        file.write(data)
    new.replace(path)
