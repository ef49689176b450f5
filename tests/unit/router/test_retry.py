from __future__ import annotations

import pytest

from router.retry import Crowd, RetryBudget


def test_a_storm_is_cut_off_and_a_trickle_goes_on() -> None:
    budget = RetryBudget(share=0.25, burst=10.0)
    spent = 0
    while budget.may_retry(0.0):
        budget.retried(0.0)
        spent += 1
    assert spent == 10
    assert not budget.may_retry(0.5)
    assert budget.may_retry(1.0), "one a second, whatever comes"
    budget.retried(1.0)
    for _ in range(8):
        budget.request_came(1.0)
    assert budget.may_retry(1.0), "eight requests pay two retries"
    budget.retried(1.0)
    assert budget.may_retry(1.0)
    budget.retried(1.0)
    assert not budget.may_retry(1.0)


def test_nothing_is_saved_up_beyond_the_burst() -> None:
    budget = RetryBudget(share=1.0, burst=3.0)
    for _ in range(100):
        budget.request_came(0.0)
    spent = 0
    while budget.may_retry(0.0):
        budget.retried(0.0)
        spent += 1
    assert spent == 3
    assert budget.spent_total == 3


def test_who_finds_no_room_comes_again_behind_those_before_it() -> None:
    crowd = Crowd()
    assert crowd.come_again_s(0.0) == 1.0, "nothing is known"
    crowd = Crowd()
    for i in range(101):
        crowd.ended(i * 0.5)  # a place every half second
    hints = [crowd.come_again_s(50.0) for _ in range(10)]
    assert hints == pytest.approx([0.5 * (i + 1) for i in range(10)])
    assert crowd.come_again_s(52.0) == pytest.approx(3.5), "four of them have found a place meanwhile"
    assert crowd.come_again_s(1000.0) == pytest.approx(0.5)
    assert max(crowd.come_again_s(1000.0) for _ in range(1000)) == 60.0
