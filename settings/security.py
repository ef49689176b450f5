"""The `security:` section, the same for every process: what listeners demand and what callers show (docs/security.md).

security:
  public_tls:   {certificate: public.crt, key: public.key, client_ca: ""}    the router's gRPC and HTTP ports
  internal_tls: {ca: internal-ca.crt, router: {...}, worker: {...}}          mutual, between routers and workers
  cluster_secret: cluster.secret                                             signs handoff tickets, proves membership
  api_keys: keys.yaml                                                        who may send requests

All are off by default, when everything listens on loopback. Paths may be replaced at any time; see settings/tls.py.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ProcessRole = Literal["router", "worker"]


class CertificateFiles(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: str = Field(min_length=1, description="PEM file: the certificate, then its intermediate CAs.")
    key: str = Field(min_length=1, description="PEM file: the private key, without a passphrase.")


class PublicTls(CertificateFiles):
    client_ca: str = Field(default="", description="PEM file of a CA; if set, clients need a certificate signed by it.")


class InternalTls(BaseModel):
    """A certificate's DNS name says what its holder may be: router.diptych.internal or worker.diptych.internal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ca: str = Field(min_length=1, description="PEM file: a CA used for this cluster only.")
    router: CertificateFiles | None = Field(default=None, description="Read by routers.")
    worker: CertificateFiles | None = Field(default=None, description="Read by workers.")


class ListenerLimits(BaseModel):
    """Of every gRPC listener. Sizes of messages and prompts: router.max_prompt_bytes and docs/security.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_connections: int = Field(
        default=4096, ge=1, description="Open connections of one listener; further ones are closed."
    )
    max_streams_per_connection: int = Field(
        default=1024, ge=1, description="Concurrent calls; further ones wait at the client."
    )
    max_calls: int = Field(
        default=16384, ge=1, description="Concurrent calls of one router listener; further ones are refused."
    )
    max_header_bytes: int = Field(
        default=16384, ge=4096, description="Size of one call's metadata; above it the call fails."
    )
    handshake_s: float = Field(
        default=10.0, ge=0.1, description="From accepting a connection to its greeting, including TLS."
    )
    idle_connection_s: float = Field(
        default=600.0, ge=1, description="A public connection without calls is closed after this."
    )


class SecurityConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    insecure_ok: bool = Field(
        default=False,
        description="Allow listening beyond loopback without TLS or authentication, because the network is trusted.",
    )
    public_tls: PublicTls | None = None
    internal_tls: InternalTls | None = None
    cluster_secret: str = Field(
        default="", description="File with a secret per line, each at least 32 characters; the first line signs."
    )
    api_keys: str = Field(default="", description="File of API keys (`diptych keys add`); empty = no key is required.")
    limits: ListenerLimits = ListenerLimits()

    def exposed(self, listeners: Iterable[tuple[str, str, Literal["public", "internal"]]]) -> list[str]:
        """`listeners`: (settings key of the host, host, kind). One line per listener that strangers could use."""
        if self.insecure_ok:
            return []
        problems = []
        for key, host, kind in listeners:
            if is_loopback(host):
                continue
            lacking = []
            if kind == "public":
                if self.public_tls is None:
                    lacking.append("security.public_tls")
                if not self.api_keys and not (self.public_tls is not None and self.public_tls.client_ca):
                    lacking.append("security.api_keys (or public_tls.client_ca)")
            elif self.internal_tls is None:
                lacking.append("security.internal_tls")
            if lacking:
                problems.append(
                    f"{key} is {host}: strangers could use this port; set {' and '.join(lacking)}, or listen on "
                    "127.0.0.1, or say security.insecure_ok: true if the network is trusted"
                )
        return problems


def is_loopback(host: str) -> bool:
    """Of a name or address to listen on. An unknown name is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
