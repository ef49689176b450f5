"""`diptych certs`, `diptych keys`, `diptych health`."""

from __future__ import annotations

import datetime
import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deploy.access import AccessError
from deploy.certificates import CertificatesError, make_all
from deploy.clients import health_of
from deploy.console import err, fail, out
from router.access.keys import KeyEntry, KeyFile, expiry, new_key, read_keys, write_keys
from settings.file import SettingsError, validate_settings

keys = typer.Typer(
    help="Manage API keys. Routers pick up changes to the file within two seconds.", no_args_is_help=True
)

File = Annotated[
    Path, typer.Argument(help="The key file (security.api_keys): .yaml, or .json for many thousands of keys")
]


def add_commands(app: typer.Typer) -> None:
    app.command()(certs)
    app.command()(health)
    app.add_typer(keys, name="keys")


def certs(
    directory: Annotated[Path, typer.Argument(help="Where to write them; existing CAs are kept")],
    host: Annotated[list[str] | None, typer.Option(help="Name or address that clients connect to; repeatable")] = None,
    days: Annotated[float, typer.Option(help="Days until the certificates expire", min=0.01)] = 90.0,
) -> None:
    """Make private CAs, certificates for routers, workers and clients, and a cluster secret."""
    try:
        written = make_all(directory, host or [], days)
    except CertificatesError as error:
        fail(str(error))
    out.print(f"{len(written)} files in {directory}; security.yaml is the section for cluster.yaml", soft_wrap=True)
    out.print(f"clients: export DIPTYCH_CA={directory.resolve()}/public-ca.crt", soft_wrap=True)


def health(
    target: Annotated[str, typer.Option(help="host:port of a router or worker")] = "localhost:8100",
    inside: Annotated[str, typer.Option(help="router or worker: use that role's certificate of the cluster")] = "",
    config: Annotated[Path | None, typer.Option(help="cluster.yaml, needed by --inside")] = None,
    timeout: Annotated[float, typer.Option(min=0.1)] = 2.0,
) -> None:
    """Check health: exit code 0 if SERVING. A probe that supports TLS (Kubernetes' own do not)."""
    try:
        said = _inside_health(target, inside, config, timeout) if inside else health_of(target, timeout)
    except (AccessError, SettingsError) as error:
        fail(str(error))
    out.print(said)
    raise typer.Exit(0 if said == "SERVING" else 1)


def _inside_health(target: str, role: str, config: Path | None, timeout_s: float) -> str:
    from deploy.clients import health_over
    from deploy.config import ClusterConfig
    from settings.file import read_settings
    from settings.tls import TlsError, Wiring

    if role not in ("router", "worker") or config is None:
        fail("--inside is router or worker, and needs --config")
    try:
        wiring = Wiring(read_settings(config, ClusterConfig).security, role)
    except TlsError as error:
        fail(str(error))
    with wiring.blocking_channel(target, role) as channel:
        return health_over(channel, timeout_s)


# Keys.


def _read(path: Path) -> KeyFile:
    try:
        return read_keys(path)
    except SettingsError as error:
        fail(str(error))


def _write(path: Path, content: KeyFile) -> None:
    try:
        write_keys(path, content)
    except OSError as error:
        fail(f"{path}: {error.strerror}; name a file that can be written")


@keys.command()
def add(
    file: File,
    tenant: Annotated[str, typer.Option(help="The key's tenant; keys of one tenant share caches")],
    admin: Annotated[bool, typer.Option("--admin", help="May see all tenants' requests (diptych status)")] = False,
    max_priority: Annotated[int, typer.Option(help="Highest priority of its requests", min=-100, max=100)] = 0,
    requests_per_minute: Annotated[int, typer.Option(help="0 = unlimited", min=0)] = 0,
    tokens_per_minute: Annotated[int, typer.Option(help="Prompt and answer; 0 = unlimited", min=0)] = 0,
    max_concurrent: Annotated[int, typer.Option(help="Concurrent requests; 0 = unlimited", min=0)] = 0,
    model: Annotated[list[str] | None, typer.Option(help="The only models it may use; repeatable")] = None,
    expires: Annotated[str, typer.Option(help="90d, 12h, or 2027-01-31; empty = never")] = "",
    note: Annotated[str, typer.Option(help="A note for people")] = "",
) -> None:
    """Make a key and print it once, on standard output; the file holds its hash."""
    content = _read(file) if file.exists() else KeyFile(keys=())
    text, key_id, sha256 = new_key(secrets.token_bytes(38))
    try:
        until = expiry(expires, datetime.datetime.now(datetime.UTC)) if expires else None
    except (ValueError, OverflowError):
        fail(f"--expires {expires} is neither a span like 90d nor a date like 2027-01-31")
    entry = {
        "id": key_id, "sha256": sha256, "tenant": tenant, "admin": admin, "max_priority": max_priority,
        "requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent, "models": tuple(model or ()), "expires": until, "note": note,
    }  # fmt: skip
    try:
        made = validate_settings(entry, KeyEntry, "diptych keys add")
    except SettingsError as error:
        fail(str(error))
    _write(file, KeyFile(keys=(*content.keys, made)))
    err.print(f"key {key_id} of tenant {tenant} is in {file}; this is the only time that it is shown:", soft_wrap=True)
    out.print(text, soft_wrap=True)


@keys.command(name="list")
def list_keys(file: File) -> None:
    """List the keys, their tenants, and what they may do."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "id",
        "tenant",
        "admin",
        "priority",
        "requests/min",
        "tokens/min",
        "at once",
        "models",
        "expires",
        "note",
    ):
        table.add_column(column, no_wrap=column in ("id", "tenant", "until"))
    now = datetime.datetime.now(datetime.UTC)
    for e in _read(file).keys:
        gone = e.expires is not None and e.expires <= now
        until = "never" if e.expires is None else f"{e.expires:%Y-%m-%d %H:%M}{' (expired)' if gone else ''}"
        limits = [str(n) if n else "-" for n in (e.requests_per_minute, e.tokens_per_minute, e.max_concurrent)]
        admin = "admin" if e.admin else ""
        table.add_row(e.id, e.tenant, admin, str(e.max_priority), *limits, " ".join(e.models) or "all", until, e.note)
    out.print(table)


@keys.command()
def revoke(file: File, key_id: Annotated[str, typer.Argument(help="As `diptych keys list` shows it")]) -> None:
    """Revoke a key. Routers refuse it within two seconds; running requests finish."""
    content = _read(file)
    left = tuple(e for e in content.keys if e.id != key_id)
    if len(left) == len(content.keys):
        fail(f"{file} has no key {key_id}; see `diptych keys list {file}`")
    _write(file, KeyFile(keys=left))
    out.print(f"revoked {key_id}")
