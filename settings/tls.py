"""TLS on gRPC: credentials of listeners, channels to peers, and who is at the other end.

Certificates are files that may be replaced while everything runs: listeners look at every handshake, channels when they
are opened. What is connected stays connected.

Inside the cluster TLS is mutual, and a name in the certificate is the role: a router dials
`worker.diptych.internal` wherever the worker's address is, and a worker takes commands from `router.diptych.internal`
only. Addresses of pods change; roles do not.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from cryptography import x509

from settings.private import warn_of_readers
from settings.secret import PROOF_METADATA, ClusterSecret, SecretError
from settings.security import CertificateFiles, ListenerLimits, ProcessRole, SecurityConfig

log = logging.getLogger(__name__)

Option = tuple[str, Any]

# Between processes of a cluster there is no proxy, whatever http_proxy says: it would be asked for loopback, too.
DIRECT: tuple[Option, ...] = (("grpc.enable_http_proxy", 0),)


class TlsError(Exception):
    """Names file, cause and fix; never the content."""


def role_name(role: str) -> str:
    return f"{role}.diptych.internal"


def _read(path: str, key: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError as error:
        raise TlsError(f"{key}: {path}: {error.strerror}; name a PEM file, or make some with `diptych certs`") from None


def check_pair(files: CertificateFiles, ca: str, key: str) -> None:
    """Before anything listens: do the files fit each other? Raises TlsError."""
    for name, path in (("certificate", files.certificate), ("key", files.key), *((("ca", ca),) if ca else ())):
        _read(path, f"{key}.{name}")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(files.certificate, files.key, password="")
        if ca:
            context.load_verify_locations(ca)
    except (ssl.SSLError, ValueError, OSError) as error:
        raise TlsError(
            f"{key}: {files.certificate} and {files.key} do not belong together, or are no PEM files "
            f"({getattr(error, 'reason', None) or error}); make some with `diptych certs`"
        ) from None


class TlsFiles:
    """The files of one identity, read again when one of them changes."""

    def __init__(self, files: CertificateFiles, ca: str, key: str) -> None:
        check_pair(files, ca, key)
        warn_of_readers(files.key, f"{key}.key")
        self.files, self.ca, self._key = files, ca, key
        self._seen: object = None
        self._complained: object = None
        self._not_after: tuple[bytes, float] = (b"", 0.0)
        self._content: tuple[bytes, bytes, bytes | None] = (b"", b"", None)

    def content(self) -> tuple[bytes, bytes, bytes | None]:
        """Key, certificate, authority. The last good ones if a file cannot be read now, or does not fit."""
        stamp = self.stamp()
        if stamp != self._seen:
            try:
                check_pair(self.files, self.ca, self._key)
                self._content = (
                    _read(self.files.key, self._key),
                    _read(self.files.certificate, self._key),
                    _read(self.ca, self._key) if self.ca else None,
                )
                self._seen = stamp
            except TlsError as error:  # perhaps being replaced: the next handshake looks again
                if self._seen is None:
                    raise
                if stamp != self._complained:
                    self._complained = stamp
                    log.error("%s. The previous certificate stays in use", error)
        return self._content

    def not_after(self) -> float:
        """When the certificate in use ends, in Unix time."""
        certificate = self.content()[1]
        if self._not_after[0] != certificate:
            ends = x509.load_pem_x509_certificate(certificate).not_valid_after_utc  # the first: the leaf
            self._not_after = certificate, ends.timestamp()
        return self._not_after[1]

    def stamp(self) -> object:
        stamps = []
        for path in (self.files.certificate, self.files.key, self.ca):
            if path:
                try:
                    s = os.stat(path)
                    stamps.append((s.st_mtime_ns, s.st_size, s.st_ino))
                except OSError:
                    stamps.append(None)
        return tuple(stamps)


def _server_credentials(files: TlsFiles, *, mutual: bool) -> grpc.ServerCredentials:
    def configuration() -> grpc.ServerCertificateConfiguration:
        key, certificate, ca = files.content()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)

    given = files.stamp()

    def when_changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal given
        stamp = files.stamp()
        if stamp == given:
            return None
        fresh, given = configuration(), stamp
        return fresh

    fetch: Any = when_changed  # may return None: nothing new; the type stubs do not know
    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=mutual)


def server_options(limits: ListenerLimits, *, public: bool) -> list[Option]:
    options: list[Option] = [
        ("grpc.max_concurrent_streams", limits.max_streams_per_connection),
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1e3)),
    ]
    if public:
        options.append(("grpc.max_connection_idle_ms", int(limits.idle_connection_s * 1e3)))
    return options


class NotAMember(Exception):
    """Why a peer is refused, in words that help its operator and tell a stranger nothing."""


class Wiring:
    """What one process shows and demands, from its `security:` section. Raises TlsError for files that do not fit."""

    def __init__(self, config: SecurityConfig, role: ProcessRole) -> None:
        self.config = config
        self.role = role
        self._public: TlsFiles | None = None
        self._internal: TlsFiles | None = None
        if config.public_tls is not None and role == "router":
            self._public = TlsFiles(config.public_tls, config.public_tls.client_ca, "security.public_tls")
        if config.internal_tls is not None:
            own = config.internal_tls.router if role == "router" else config.internal_tls.worker
            if own is None:
                raise TlsError(f"security.internal_tls.{role} is not set; a {role} needs a certificate of its own")
            self._internal = TlsFiles(own, config.internal_tls.ca, f"security.internal_tls.{role}")
        try:
            self.secret = ClusterSecret(config.cluster_secret) if config.cluster_secret else None
        except SecretError as error:
            raise TlsError(str(error)) from None

    # Listening.

    def listen(self, server: grpc.aio.Server, address: str, *, public: bool) -> int:
        """Returns the port. Raises RuntimeError when it is taken."""
        files = self._public if public else self._internal
        if files is None:
            return server.add_insecure_port(address)
        mutual = not public or bool(self.config.public_tls and self.config.public_tls.client_ca)
        return server.add_secure_port(address, _server_credentials(files, mutual=mutual))

    @property
    def internal_tls(self) -> bool:
        return self._internal is not None

    def https(self) -> Callable[[], ssl.SSLContext] | None:
        """Mutual TLS with the cluster's authority, for what is no gRPC; asked at every connection. None: it is off."""
        files = self._internal
        if files is None:
            return None
        made: tuple[object, ssl.SSLContext] | None = None

        def context() -> ssl.SSLContext:
            nonlocal made
            stamp = files.stamp()
            if made is None or made[0] != stamp:
                fresh = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files.ca)
                fresh.verify_mode = ssl.CERT_REQUIRED
                fresh.load_cert_chain(files.files.certificate, files.files.key)
                made = stamp, fresh
            return made[1]

        return context

    def expiries(self) -> dict[str, float]:
        """By listener, when its certificate ends, in Unix time."""
        files = {"public": self._public, "internal": self._internal}
        return {listener: f.not_after() for listener, f in files.items() if f is not None}

    def public_files(self) -> TlsFiles | None:
        return self._public

    def internal_authentication(self) -> str:
        """For people."""
        parts = ["mutual TLS"] if self._internal is not None else []
        if self.secret is not None:
            parts.append("cluster secret")
        return " and ".join(parts) or "none"

    def public_authentication(self) -> str:
        parts = []
        if self.config.public_tls is not None and self.config.public_tls.client_ca:
            parts.append("mutual TLS")
        if self.config.api_keys:
            parts.append("API key")
        return " and ".join(parts) or "none"

    # Dialling.

    def stamp(self) -> object:
        """Changes when the own certificate does: a channel that is kept is then opened anew."""
        return None if self._internal is None else self._internal.stamp()

    def channel(self, address: str, peer: ProcessRole, options: Sequence[Option] = ()) -> grpc.aio.Channel:
        if self._internal is None:
            return grpc.aio.insecure_channel(address, options=[*options, *DIRECT])
        credentials, named = self._credentials(peer)
        return grpc.aio.secure_channel(address, credentials, options=[*options, *named, *DIRECT])

    def blocking_channel(self, address: str, peer: ProcessRole, options: Sequence[Option] = ()) -> grpc.Channel:
        """The same for code without an event loop."""
        if self._internal is None:
            return grpc.insecure_channel(address, options=[*options, *DIRECT])
        credentials, named = self._credentials(peer)
        return grpc.secure_channel(address, credentials, options=[*options, *named, *DIRECT])

    def _credentials(self, peer: ProcessRole) -> tuple[grpc.ChannelCredentials, list[Option]]:
        assert self._internal is not None
        key, certificate, ca = self._internal.content()
        return grpc.ssl_channel_credentials(ca, key, certificate), [
            ("grpc.ssl_target_name_override", role_name(peer)),
        ]

    def proof(self) -> tuple[tuple[str, str], ...]:
        """Metadata of a call to another member."""
        return () if self.secret is None else ((PROOF_METADATA, self.secret.proof(self.role, time.time())),)

    # Who calls.

    def check_peer(self, context: Any, *roles: ProcessRole) -> None:
        """Raises NotAMember unless the caller is of one of these roles. Nothing is asked for when security is off."""
        if self._internal is not None:
            names = context.auth_context().get("x509_subject_alternative_name", ())
            if not any(role_name(role).encode() in names for role in roles):
                raise NotAMember(f"the certificate is not one of a {' or '.join(roles)}; see `diptych certs`")
        if self.secret is not None:
            given = dict(context.invocation_metadata() or ()).get(PROOF_METADATA, "")
            why = self.secret.check_proof(given if isinstance(given, str) else "", roles, time.time())
            if why:
                raise NotAMember(why)


INSECURE: dict[ProcessRole, Wiring] = {
    "router": Wiring(SecurityConfig(), "router"),
    "worker": Wiring(SecurityConfig(), "worker"),
}
