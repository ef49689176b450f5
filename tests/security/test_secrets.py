"""Secrets stay where they are. Runs last in this folder: the logs of all the attacks before it are searched."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from kv_transfer.tickets import Wallet
from router.access.gate import Caller, Gate
from router.access.keys import KeyTable, read_keys
from settings.security import SecurityConfig
from settings.tls import Wiring
from tests.security.test_doors import refused
from tests.support.processes import Cluster
from tests.support.secure import Secured


def private_parts(secured: Secured) -> dict[str, str]:
    """What must not be seen, by name."""
    parts = {f"secret {i}": text for i, text in enumerate(secured.secrets)}
    parts |= {f"secret part {i}": text.split("_", 2)[2] for i, text in enumerate(secured.secrets) if "dpt_" in text}
    for path in secured.directory.glob("*.key"):
        parts[path.name] = path.read_text().splitlines()[2]
    return parts


def test_no_secret_is_in_any_log_or_command_line(cluster: Cluster, secured: Secured) -> None:
    for key in (secured.secrets[1] + "x", "dpt_000000000000_hunter2", "hunter2"):
        assert refused(cluster, secured.access(key)).code() is grpc.StatusCode.UNAUTHENTICATED
    parts = private_parts(secured) | {"a wrong key": "hunter2"}
    seen = {path.name: path.read_text(errors="replace") for path in cluster.directory.iterdir() if path.is_file()}
    for name, process in cluster.processes.running.items():
        seen[f"command line of {name}"] = Path(f"/proc/{process.pid}/cmdline").read_text()
    assert len(seen) >= 9
    assert any("may not follow" in text or "was not attached" in text for text in seen.values()), "attacks were logged"
    for where, text in seen.items():
        for what, part in parts.items():
            assert part not in text, f"{what} is in {where}"


def test_no_secret_is_in_a_repr(secured: Secured) -> None:
    wiring = Wiring(SecurityConfig.model_validate(secured.security), "router")
    gate = Gate(KeyTable(read_keys(secured.key_file).keys))
    caller = gate.authenticate(f"Bearer {secured.secrets[1]}")
    things = (
        wiring,
        wiring.secret,
        wiring.config,
        gate,
        caller,
        Caller(caller.key),
        Wallet(),
        secured.access("dpt_a_b"),
    )
    shown = " ".join(f"{thing!r} {thing}" for thing in things)
    for what, part in (private_parts(secured) | {"a client's key": "dpt_a_b"}).items():
        assert part not in shown, what


@pytest.mark.parametrize("name", ["router.key", "worker.key", "public.key", "cluster.secret", "keys.yaml"])
def test_files_with_secrets_are_their_owners_alone(secured: Secured, name: str) -> None:
    assert (secured.directory / name).stat().st_mode & 0o077 == 0
