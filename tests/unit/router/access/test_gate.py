"""API keys, tenants and what a caller may ask for, without a router."""

from __future__ import annotations

import datetime
import secrets
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.access.gate import CALLER, Caller, Gate, KeyFileWatch, scoped_id, scoped_salt
from router.access.keys import KeyEntry, KeyFile, KeyTable, expiry, new_key, read_keys, write_keys
from router.errors import Code, RequestRefused
from settings.file import SettingsError

UTC = datetime.UTC
NOW = datetime.datetime(2026, 11, 21, tzinfo=UTC).timestamp()


def entry(**fields: object) -> tuple[str, KeyEntry]:
    key, key_id, sha256 = new_key(secrets.token_bytes(38))
    return key, KeyEntry.model_validate({"id": key_id, "sha256": sha256, "tenant": "acme", **fields})


def gate_with(*entries: KeyEntry) -> Gate:
    return Gate(KeyTable(entries), wall_clock=lambda: NOW)


def refusal(gate: Gate, header: str | None) -> Code:
    with pytest.raises(RequestRefused) as caught:
        gate.authenticate(header)
    return caught.value.failure.code


def test_a_good_key_is_found_and_everything_else_is_refused() -> None:
    key, known = entry()
    gate = gate_with(known)
    assert gate.authenticate(f"Bearer {key}").tenant == "acme"
    assert gate.authenticate(f"bearer  {key} ").tenant == "acme"
    stranger, _ = entry()
    forged = f"dpt_{known.id}_{stranger.split('_', 2)[2]}"
    for bad in (None, "", "Bearer", "Bearer ", key, f"Basic {key}", f"Bearer {stranger}", f"Bearer {forged}",
                f"Bearer {key}x", f"Bearer {key[:-1]}", "Bearer " + "x" * 5000, f"Bearer {known.sha256}"):  # fmt: skip
        assert refusal(gate, bad) is Code.UNAUTHENTICATED
    assert gate.refused_total == 12


def test_expired_and_revoked_keys() -> None:
    key, known = entry(expires=datetime.datetime(2026, 11, 20, tzinfo=UTC))
    assert refusal(gate_with(known), f"Bearer {key}") is Code.UNAUTHENTICATED
    key, known = entry()
    gate = gate_with(known)
    token = CALLER.set(gate.authenticate(f"Bearer {key}"))
    try:
        assert gate.current().tenant == "acme"
        gate.keys = KeyTable([known.model_copy(update={"max_priority": 7})])
        assert gate.priority(gate.current(), 7) == 7
        gate.keys = KeyTable([])
        with pytest.raises(RequestRefused, match="revoked"):
            gate.current()
    finally:
        CALLER.reset(token)


def test_a_door_that_forgot_to_ask_lets_nobody_in() -> None:
    with pytest.raises(RequestRefused):
        gate_with().current()
    assert Gate().current().admin


def test_priority_model_and_admin() -> None:
    _, low = entry(max_priority=-5, models=("small",))
    gate, caller = gate_with(low), Caller(low)
    assert gate.priority(caller, 0) == -5
    assert gate.priority(caller, -50) == -50
    with pytest.raises(RequestRefused):
        gate.priority(caller, 1)
    with pytest.raises(RequestRefused) as caught:
        gate.enter(caller, ("large",), 0.0)
    assert caught.value.failure.code is Code.PERMISSION_DENIED
    gate.enter(caller, ("tiny", "small"), 0.0).leave(0, 0.0)
    assert not caller.admin


def test_a_pass_is_left_once_however_often_it_is_said() -> None:
    _, known = entry(max_concurrent=1, tokens_per_minute=100)
    gate, caller = gate_with(known), Caller(known)
    way = gate.enter(caller, ("m",), 0.0)
    way.take_tokens(60, 0.0)
    with pytest.raises(RequestRefused) as caught:
        gate.enter(caller, ("m",), 0.0)
    assert caught.value.failure.retry_after_ms == 1000
    way.leave(10, 0.0)
    way.leave(10, 0.0)
    gate.enter(caller, ("m",), 0.0).take_tokens(90, 0.0)


@given(
    one=st.tuples(st.text(alphabet="ab:1+-", max_size=4), st.text(max_size=6)),
    other=st.tuples(st.text(alphabet="ab:1+-", max_size=4), st.text(max_size=6)),
)
def test_no_two_tenants_share_a_salt(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (scoped_salt(*one) == scoped_salt(*other)) == (one == other)
    if "\n" not in one[1] + other[1]:
        assert (scoped_id(*one) == scoped_id(*other)) == (one == other)


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_the_key_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    key, known = entry(expires=expiry("90d", datetime.datetime(2026, 1, 1, tzinfo=UTC)), models=("a", "b"))
    write_keys(path, KeyFile(keys=(known,)))
    assert read_keys(path).keys == (known,)
    assert path.stat().st_mode & 0o077 == 0
    assert key.split("_", 2)[2] not in path.read_text()


def test_a_secret_in_the_wrong_place_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("keys: [{id: abcd, sha256: dpt_hunter2, tenant: t}]")
    with pytest.raises(SettingsError) as caught:
        read_keys(path)
    assert "sha256" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    twice = "{id: abcd, sha256: '" + "0" * 64 + "', tenant: t}"
    path.write_text(f"keys: [{', '.join(2 * [twice])}]")
    with pytest.raises(SettingsError, match="given twice"):
        read_keys(path)


def test_two_keys_at_once_are_none() -> None:
    """Whoever stands before the router may have looked at the other."""
    (key, known), (other, _) = entry(), entry()
    gate = gate_with(known)
    assert gate.authenticate_one([f"Bearer {key}"]).tenant == "acme"
    assert gate.authenticate_one([f"Bearer {key}".encode()]).tenant == "acme"
    for headers in ([], [f"Bearer {key}"] * 2, [f"Bearer {other}", f"Bearer {key}"], [b"\xff\xfe"]):
        with pytest.raises(RequestRefused):
            gate.authenticate_one(headers)
    assert Gate().authenticate_one(["Basic x", "Basic y"]).admin, "without keys nobody looks"


# The watch of the file.


async def looked(watch: KeyFileWatch) -> None:
    """A change is seen at the first look, and read at the second, when it has settled."""
    await watch.look()
    await watch.look()


@pytest.mark.parametrize("cut", ["", "keys:", "key", "{}", "keys: [", "# nothing"])
async def test_a_file_that_was_cut_short_locks_nobody_out(
    tmp_path: Path, cut: str, caplog: pytest.LogCaptureFixture
) -> None:
    key, known = entry()
    path, gate = tmp_path / "keys.yaml", Gate()
    write_keys(path, KeyFile(keys=(known,)))
    watch = KeyFileWatch(str(path), gate)
    path.write_text(cut)
    await looked(watch)
    assert gate.authenticate(f"Bearer {key}").tenant == "acme"
    assert "The keys read before stay in force" in caplog.text
    path.unlink()
    await looked(watch)
    assert gate.authenticate(f"Bearer {key}").tenant == "acme"
    write_keys(path, KeyFile(keys=()))  # what revoking the last key writes is meant
    await looked(watch)
    with pytest.raises(RequestRefused, match="not known"):
        gate.authenticate(f"Bearer {key}")
    with pytest.raises(SettingsError, match="nobody could come in"):
        KeyFileWatch(str(path), gate)


async def test_a_file_is_read_when_it_has_settled(tmp_path: Path) -> None:
    """Half a file of the right form is a smaller set of keys: nothing tells it from a whole one but that it grows."""
    (one, first), (two, second) = entry(), entry()
    path, gate = tmp_path / "keys.yaml", Gate()
    write_keys(path, KeyFile(keys=(first, second)))
    watch = KeyFileWatch(str(path), gate)
    whole = path.read_text()
    path.write_text(whole[: whole.index("- ", whole.index("- ") + 2)])
    await watch.look()
    path.write_text(whole)
    await watch.look()
    await watch.look()
    for key in (one, two):
        assert gate.authenticate(f"Bearer {key}")


def test_a_key_file_that_others_may_read_is_complained_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, known = entry()
    path = tmp_path / "keys.yaml"
    write_keys(path, KeyFile(keys=(known,)))
    KeyFileWatch(str(path), Gate())
    assert not caplog.records
    path.chmod(0o644)
    KeyFileWatch(str(path), Gate())
    assert "chmod 600" in caplog.text
