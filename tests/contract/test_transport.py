"""What every transport must do, in process and over NIXL, by read and by reader-driven write."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerId
from kv_transfer.nixl_transport import NixlTransport
from kv_transfer.transport import PullFinal, PullOrder, PullOutcome, PullStatus, TransportEvent
from tests.support.kv_pool import Pool, SourceProcess
from tests.support.wired import SOURCE, InProcess, Nixl, Wired

# Pools of three groups, of different sizes: as (blocks, bytes of each).
SOURCE_AREAS = [(64, 16 << 10), (8, 1000), (32, 40 << 10)]  # ids 0 to 63, 64 to 71, 72 to 103
READER_AREAS = [(64, 16 << 10), (6, 1000), (40, 40 << 10)]  # ids 0 to 63, 64 to 69, 70 to 109
SOURCE_BLOCKS, READER_BLOCKS = 104, 110
BLOCK_BYTES = SOURCE_AREAS[0][1]
# Of each area, its first and last block on either side.
PAIRS = [(0, 63), (63, 0), (64, 69), (71, 64), (72, 109), (103, 70)]


def nixl(mode: str) -> Nixl:
    return Nixl(mode, SOURCE_AREAS, READER_AREAS)


@pytest.fixture(params=["inprocess", "nixl-read", "nixl-write"])
def wired(request: pytest.FixtureRequest) -> Iterator[Wired]:
    kind = request.param
    pair = InProcess(SOURCE_AREAS, READER_AREAS) if kind == "inprocess" else nixl(kind.split("-")[1])
    yield pair
    pair.close()


def test_right_bytes_in_the_right_blocks_and_nowhere_else(wired: Wired) -> None:
    pairs = [PAIRS[i] for i in (4, 0, 2, 1, 5, 3)]  # areas mixed within a pull
    for remote, _ in pairs:
        wired.fill(remote, remote + 1)
    outcome = wired.outcome(wired.order([remote for remote, _ in pairs], [local for _, local in pairs]))
    assert outcome.status is PullStatus.ARRIVED, outcome
    assert outcome.final
    wired.holds({local: remote + 1 for remote, local in pairs})


def test_many_pulls_at_once(wired: Wired) -> None:
    pairs = [(i, i) for i in range(70)] + [(72 + i, 70 + i) for i in range(32)]
    for remote, _ in pairs:
        wired.fill(remote, remote + 1)
    several = [pairs[i::7] for i in range(7)]
    numbers = [wired.order([remote for remote, _ in some], [local for _, local in some]) for some in several]
    assert all(wired.outcome(n).status is PullStatus.ARRIVED for n in numbers)
    wired.holds({local: remote + 1 for remote, local in pairs})


def test_a_raised_generation_is_a_failed_pull_in_every_area(wired: Wired) -> None:
    for remote, local in PAIRS[1::2]:
        wired.set_generation(remote, 4)
        assert wired.outcome(wired.order([remote], [local], generation=4)).status is PullStatus.ARRIVED
        wired.set_generation(remote, 5)
        outcome = wired.outcome(wired.order([6, remote], [1, local], generations=[0, 4]))
        assert outcome.status is PullStatus.FENCED
        assert outcome.final
        assert f"block {remote} " in outcome.detail


def test_digests_are_checked_on_what_arrived_in_every_area(wired: Wired) -> None:
    for remote, local in PAIRS:
        wired.fill(remote, 9)
        right = wired.digest(remote)
        assert wired.outcome(wired.order([remote], [local], digests=[right])).status is PullStatus.ARRIVED
        assert wired.outcome(wired.order([remote], [local], digests=[right ^ 1])).status is PullStatus.DIGEST_MISMATCH


def test_a_pair_of_two_groups_moves_nothing(wired: Wired) -> None:
    """What belongs to one group of layers would stand where another is looked for."""
    for remote, local, why in (
        ([0, 64], [0, 1], "block 1 lies in area 0 and the peer's block 64 in area 1"),
        ([0, 1], [0, 64], "block 64 lies in area 1 and the peer's block 1 in area 0"),
        ([0, 71], [0, 70], "block 70 lies in area 2 and the peer's block 71 in area 1"),
        ([72], [69], "block 69 lies in area 1 and the peer's block 72 in area 2"),
        ([5, 6], [5, -1], "out of range"),  # -1: a block that a window has left
        ([-1], [0], "out of range"),
    ):
        outcome = wired.outcome(wired.order(remote, local))
        assert outcome.status is PullStatus.TRANSPORT_ERROR
        assert outcome.final
        assert why in outcome.detail
    wired.holds({})
    assert wired.outcome(wired.order([71], [69])).status is PullStatus.ARRIVED


def test_a_source_writes_no_pair_of_two_groups_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.nixl_pulls.unlike", lambda *_: None)
    wired = nixl("write")
    try:
        for remote, local in (([0, 64], [0, 1]), ([0, SOURCE_BLOCKS], [0, 1]), ([0, 1], [0, READER_BLOCKS])):
            outcome = wired.outcome(wired.order(remote, local))
            assert outcome.status is PullStatus.TRANSPORT_ERROR
            assert outcome.final
        wired.holds({})
        assert wired.outcome(wired.order([1], [1])).status is PullStatus.ARRIVED
    finally:
        wired.close()


def test_a_peer_of_other_areas_is_refused(wired: Wired, caplog: pytest.LogCaptureFixture) -> None:
    """The fingerprints of the layouts say it before; but the endpoint names the bytes that would be moved."""
    first, second, third = SOURCE_AREAS
    for number, areas in enumerate(
        ([first, second], [*SOURCE_AREAS, (4, 64)], [first, (8, 1008), third], [first, third, second])
    ):
        other = PeerId(f"other-{number}", 1)
        wired.connect_to_areas(other, areas)
        outcome = wired.outcome(wired.order([0], [0], source=other))
        assert outcome.status is PullStatus.PEER_LOST
    wired.holds({})
    if isinstance(wired, Nixl):
        assert caplog.text.count("bytes, ours have 16384 and 1000 and 40960") == 4
        assert "blocks of 16384 and 1008 and 40960 bytes" in caplog.text


def test_a_stranger_cannot_be_pulled_from(wired: Wired) -> None:
    for stranger in (PeerId("nobody", 1), PeerId("source", 2)):
        outcome = wired.outcome(wired.order([0], [0], source=stranger))
        assert outcome.status is PullStatus.PEER_LOST
        assert outcome.final


def test_a_disconnected_peer_is_lost_and_can_come_back(wired: Wired) -> None:
    wired.transport.disconnect(SOURCE)
    assert wired.outcome(wired.order([0], [0])).status is PullStatus.PEER_LOST
    if isinstance(wired, Nixl):
        wired.transport.connect(SOURCE, wired.source.endpoint)
    else:
        wired.transport.connect(SOURCE, wired.source.endpoint())  # type: ignore[attr-defined]
    assert wired.outcome(wired.order([0], [0])).status is PullStatus.ARRIVED


def test_a_dead_source_is_an_outcome_not_a_hang(wired: Wired) -> None:
    assert wired.outcome(wired.order([0], [0])).status is PullStatus.ARRIVED
    wired.kill_source()
    outcome = wired.outcome(wired.order([1], [1], timeout_s=3.0))
    assert outcome.status in (PullStatus.PEER_LOST, PullStatus.TRANSPORT_ERROR, PullStatus.TIMED_OUT)


def test_an_abandoned_pull_ends_at_once_and_becomes_final(wired: Wired) -> None:
    number = wired.order(list(range(32)), list(range(32)))
    wired.transport.abandon(number)
    outcome = wired.outcome(number)
    assert outcome.status in (PullStatus.ABANDONED, PullStatus.ARRIVED)
    if not outcome.final:
        wired.final(number)
    wired.transport.abandon(number)
    wired.transport.abandon(12345)


def test_what_cannot_be_is_refused(wired: Wired) -> None:
    for remote, local in ((SOURCE_BLOCKS, 0), (0, READER_BLOCKS)):
        outcome = wired.outcome(wired.order([remote], [local]))
        assert outcome.status is PullStatus.TRANSPORT_ERROR
        assert "out of range" in outcome.detail
    if isinstance(wired, Nixl):
        outcome = wired.outcome(wired.order([0] * 300, [0] * 300))
        assert outcome.status is PullStatus.TRANSPORT_ERROR
        assert "the limit is 256" in outcome.detail


def test_garbage_for_an_endpoint_only_means_not_connected() -> None:
    pool = Pool([(4, 4096)])
    events: list[TransportEvent] = []
    transport = NixlTransport(PeerId("lonely", 1), TransportConfig(ucx_net_devices="lo"), events.append)
    transport.register(pool.memory())
    transport.connect(PeerId("bad", 1), b"garbage")
    transport.connect(PeerId("bad", 2), transport.endpoint()[:-10] + b"x" * 10)
    transport.submit(PullOrder(1, PeerId("bad", 1), (0,), (0,), (0,), (), 1.0))
    deadline = time.monotonic() + 5
    while not events and time.monotonic() < deadline:
        time.sleep(0.001)
    assert isinstance(events[0], PullOutcome)
    assert events[0].status is PullStatus.PEER_LOST
    transport.close(5.0)


def test_a_device_that_is_not_there_is_said_with_the_fix() -> None:
    """In a process of its own: what UCX reads of the environment it reads once."""
    script = (
        "from kv_transfer.config import TransportConfig\n"
        "from kv_transfer.handoff import PeerId\n"
        "from kv_transfer.nixl_agent import NixlAgent, NixlUnavailable\n"
        "from tests.support.kv_pool import Pool\n"
        "config = TransportConfig(ucx_net_devices='nosuchdev0', ucx_tls='tcp')\n"
        "try:\n"
        "    NixlAgent(PeerId('one', 1), config, Pool([(4, 4096)]).memory())\n"
        "except NixlUnavailable as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert "transport.ucx_net_devices is nosuchdev0: name interfaces of this host" in done.stdout, done.stderr


@pytest.mark.parametrize("mode", ["read", "write"])
def test_a_restarted_source_is_another_peer(mode: str) -> None:
    pair = nixl(mode)
    reborn = None
    try:
        assert pair.outcome(pair.order([0], [0])).status is PullStatus.ARRIVED
        pair.kill_source()
        pair.transport.disconnect(SOURCE)
        reborn = SourceProcess(SOURCE_AREAS, pair.options, epoch=2)
        pair.introduce(reborn, PeerId("source", 2))
        reborn.command(do="fill", block=0, value=77)
        assert pair.outcome(pair.order([0], [5], source=PeerId("source", 2))).status is PullStatus.ARRIVED
        assert (pair.pool.blocks[5] == 77).all()
        assert pair.outcome(pair.order([0], [6])).status is PullStatus.PEER_LOST
    finally:
        pair.close()
        if reborn is not None:
            reborn.close()


def test_closing_leaves_no_thread() -> None:
    before = {t.name for t in threading.enumerate()}
    pair = nixl("read")
    pair.close()
    assert {t.name for t in threading.enumerate()} <= before


def test_a_slowed_transport_takes_its_time() -> None:
    pair = nixl("read")
    try:
        events: list[TransportEvent] = []
        pair.transport.close(5.0)
        slow = NixlTransport(
            PeerId("slow", 1), TransportConfig(ucx_net_devices="lo", slow_bytes_per_s=10 * BLOCK_BYTES), events.append
        )
        slow.register(pair.pool.memory())
        slow.connect(SOURCE, pair.source.endpoint)
        started = time.monotonic()
        slow.submit(PullOrder(1, SOURCE, (0, 1), (0, 1), (0, 0), (), 5.0))
        while not events:
            time.sleep(0.001)
        assert time.monotonic() - started >= 0.2
        slow.close(5.0)
    finally:
        pair.source.close()


def test_a_probe_takes_the_whole_way_and_no_block(wired: Wired) -> None:
    assert wired.outcome(wired.order([], [])).status is PullStatus.ARRIVED
    wired.holds({})
    wired.kill_source()
    assert wired.outcome(wired.order([], [], timeout_s=1.0)).status is not PullStatus.ARRIVED


@pytest.mark.timeout(60)
def test_the_writes_of_a_source_that_is_gone_for_good_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left to say so: without a bound the blocks would stay in quarantine for ever."""
    monkeypatch.setattr("kv_transfer.nixl_pulls._GONE_S", 0.3)
    wired = nixl("write")
    try:
        wired.source.process.send_signal(signal.SIGSTOP)
        number = wired.order([1, 2], [1, 2], timeout_s=0.2)
        outcome = wired.outcome(number)
        assert (outcome.status, outcome.final) == (PullStatus.TIMED_OUT, False)
        wired.source.kill()
        time.sleep(0.5)
        assert not [e for e in wired.events if isinstance(e, PullFinal)], "it might come back"
        wired.transport.forget(SOURCE)
        wired.final(number)
    finally:
        wired.close()


@pytest.mark.timeout(60)
def test_a_source_that_goes_on_says_that_a_write_is_over() -> None:
    wired = nixl("write")
    try:
        wired.source.process.send_signal(signal.SIGSTOP)
        number = wired.order([1, 2], [1, 2], timeout_s=0.2)
        assert not wired.outcome(number).final
        wired.source.process.send_signal(signal.SIGCONT)
        wired.final(number)
        assert wired.outcome(wired.order([3], [3])).status is PullStatus.ARRIVED
    finally:
        wired.close()


@pytest.mark.timeout(60)
def test_a_request_that_comes_before_its_reader_is_known_is_served_then() -> None:
    """A rank of a reader hears of a source at another moment than the source's rank hears of the reader."""
    wired = nixl("write")
    source = None
    try:
        source = SourceProcess(SOURCE_AREAS, wired.options, epoch=5)
        other = PeerId("source", 5)
        wired.transport.connect(other, source.endpoint)
        number = wired.order([3], [4], source=other)
        wired.wait(lambda: source.command(do="early")["early"] or None)
        source.command(do="fill", block=3, value=5)
        wired.introduce(source, other)
        assert wired.outcome(number).status is PullStatus.ARRIVED
        wired.holds({4: 5})
    finally:
        wired.close()
        if source is not None:
            source.close()
