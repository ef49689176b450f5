"""Peaks that come faster than a worker starts: what is kept for the next one, and for how long."""

from __future__ import annotations

from scaling.demand import Load
from scaling.peaks import Peak, floor, noted
from tests.unit.scaling.test_policy import Cluster

START_S = 40.0
SMALL, LARGE = Load(2.0, 1.0, 0.1, 0.1), Load(3.0, 2.0, 0.1, 0.1)


def test_a_peak_is_its_largest_load_and_lasts_while_it_strains() -> None:
    peaks: tuple[Peak, ...] = ()
    for now, load, strained in ((0.0, SMALL, 1.2), (5.0, SMALL, 1.8), (10.0, LARGE, 1.5), (15.0, SMALL, 1.1)):
        peaks = noted(peaks, now, load, strained, START_S, settled=now <= 5.0)
    (peak,) = peaks
    assert (peak.began, peak.ended, peak.load) == (5.0, 15.0, LARGE)
    assert noted(peaks, 20.0, SMALL, 0.5, START_S, settled=True) == peaks


def test_a_strain_that_a_missing_worker_causes_is_no_peak() -> None:
    assert noted((), 5.0, LARGE, 3.0, START_S, settled=False) == ()


def test_one_alone_is_kept_for_some_starts_and_ones_that_recur_for_longer() -> None:
    first = Peak(100.0, 150.0, LARGE)
    kept = floor((first,), 160.0, START_S)
    assert kept is not None
    assert (kept.load, kept.left_s) == (LARGE, 6 * START_S - 10.0)
    assert floor((first,), 150.0 + 6 * START_S, START_S) is None
    second = Peak(450.0, 500.0, SMALL)
    kept = floor((first, second), 500.0 + 6 * START_S, START_S)
    assert kept is not None, "they came 300 s apart"
    assert kept.load == LARGE
    assert floor((first, second), 500.0 + 1.5 * 300.0, START_S) is None
    assert floor((), 0.0, START_S) is None


def test_only_the_last_are_remembered_and_none_for_ever() -> None:
    peaks: tuple[Peak, ...] = ()
    for i in range(9):
        peaks = noted(peaks, i * 10_000.0, LARGE, 2.0, START_S, settled=True)
    assert len(peaks) == 4
    kept = floor(peaks, 80_000.0, START_S)
    assert kept is not None
    assert kept.left_s == 6 * START_S, "so far apart nothing recurs"


def test_bursts_that_recur_find_the_workers_of_the_last_one() -> None:
    cluster = Cluster(1, 1)
    cluster.settle(2.0, 100.0)
    for _ in range(2):
        cluster.settle(16.0, 60.0)
        quiet = cluster.settle(2.0, 200.0)
    assert "peak" in [d.rule for d in quiet]
    count = sum(cluster.pair())
    assert count > 2
    assert not [d for d in cluster.settle(16.0, 60.0) if d.started], "who is needed is there"
    cluster.settle(2.0, 1500.0)
    assert sum(cluster.pair()) == 2, "it has not come again"
