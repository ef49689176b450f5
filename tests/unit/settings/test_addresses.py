"""Host and port meet in one place, for IPv6 as for IPv4."""

from __future__ import annotations

import errno
import re
import socket
from pathlib import Path

import pytest

from settings.addresses import apart, bare, cannot_listen, from_here, host_of, is_everywhere, join, listening_socket

ROOT = Path(__file__).resolve().parents[3]
_PRODUCT = ("settings", "router", "worker", "prefill_worker", "decode_worker", "kv_transfer", "engine", "deploy")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:8100"),
        ("localhost", "localhost:8100"),
        ("::1", "[::1]:8100"),
        ("[::1]", "[::1]:8100"),
        ("fe80::1%eth0", "[fe80::1%eth0]:8100"),
    ],
)
def test_an_address_is_put_together_and_taken_apart(host: str, address: str) -> None:
    assert join(host, 8100) == address
    assert host_of(address) == bare(host)


@pytest.mark.parametrize(
    "address", ["routers", "routers:", ":8101", "[]:8101", "routers:0", "routers:65536", "routers:8x", "a:²"]
)
def test_what_is_no_address_is_named(address: str) -> None:
    with pytest.raises(ValueError, match="use NAME:PORT"):
        apart(address)


def test_an_address_is_taken_apart() -> None:
    assert apart("routers:8101") == ("routers", 8101)
    assert apart("[::1]:8101") == ("::1", 8101)


def test_what_listens_everywhere_is_dialled_at_loopback_of_its_own_family() -> None:
    assert [from_here(host) for host in ("0.0.0.0", "::", "[::]", "10.0.0.1")] == [
        "127.0.0.1", "::1", "::1", "10.0.0.1",
    ]  # fmt: skip
    assert is_everywhere("[::]")
    assert not is_everywhere("::1")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost"])
def test_every_way_to_write_a_host_can_be_bound(host: str) -> None:
    with listening_socket(host, 0, 1) as listener:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        assert listener.family is family
        with socket.create_connection(listener.getsockname()[:2], timeout=5):
            pass


def test_the_reason_is_the_ports_only_where_it_is() -> None:
    with listening_socket("::1", 0, 1) as taken:
        port = taken.getsockname()[1]
        said = cannot_listen("::1", port, "router.host", "router.grpc_port")
    assert (
        said
        == f"cannot listen on [::1]:{port}: Address already in use; free it, or set router.grpc_port to another port"
    )
    said = cannot_listen("2001:db8::1", 8100, "router.host", "router.grpc_port")
    assert "[2001:db8::1]:8100" in said
    assert "set router.host to an address that this machine has" in said
    assert "router.grpc_port" not in said
    said = cannot_listen("no.such.host.invalid", 8100, "worker.host", "worker.port")
    assert "no.such.host.invalid:8100" in said
    assert "worker.host" in said
    said = cannot_listen(
        "::1", 80, "router.host", "router.http_port", PermissionError(errno.EACCES, "Permission denied")
    )
    assert "1024 or higher" in said


def test_nobody_else_puts_a_colon_between_host_and_port() -> None:
    """Neither by a format string nor by taking an address apart at its last colon."""
    joined = re.compile(r"(host|address|hostname)[a-z_.()\"\[\]']*\}:\{|\.r?(split|partition)\(\":\"")
    theirs = re.compile(r"line|rest\.|node\.tag|device|part\.|text\.split|\.name\b")  # not addresses
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for package in _PRODUCT
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "addresses.py"
        for line in path.read_text().splitlines()
        if joined.search(line) and not theirs.search(line)
    ]
    assert found == []
