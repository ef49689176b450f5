"""Token buckets in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.access.rate_limit import Allowance, RateLimits


def test_requests_a_minute_with_a_minutes_burst_and_a_true_retry_hint() -> None:
    limits, allowance = RateLimits(), Allowance(requests_per_minute=6)
    for _ in range(6):
        assert limits.begin("k", allowance, 0.0) is None
    over = limits.begin("k", allowance, 0.0)
    assert over is not None
    assert over.retry_after_s == pytest.approx(10.0)
    assert limits.begin("k", allowance, 9.9) is not None
    assert limits.begin("k", allowance, 10.01) is None
    assert limits.begin("other", allowance, 0.0) is None


def test_tokens_are_reserved_and_what_was_not_used_goes_back() -> None:
    limits, allowance = RateLimits(), Allowance(tokens_per_minute=600)
    assert limits.begin("k", allowance, 0.0) is None
    assert limits.take_tokens("k", 500, 0.0) is None
    assert limits.begin("k", allowance, 0.0) is None
    over = limits.take_tokens("k", 300, 0.0)
    assert over is not None
    assert over.retry_after_s == pytest.approx(20.0)
    limits.end("k", 0, 0.0)
    limits.end("k", 400, 0.0)  # 100 were used
    assert limits.begin("k", allowance, 0.0) is None
    assert limits.take_tokens("k", 300, 0.0) is None


def test_more_than_a_minute_holds_is_refused_without_a_hint() -> None:
    limits, allowance = RateLimits(), Allowance(tokens_per_minute=100)
    assert limits.begin("k", allowance, 0.0) is None
    over = limits.take_tokens("k", 101, 0.0)
    assert over is not None
    assert over.retry_after_s == 0
    assert "max_tokens" in over.what


def test_a_further_answer_is_no_request_and_takes_tokens() -> None:
    limits, allowance = RateLimits(), Allowance(requests_per_minute=1, tokens_per_minute=100)
    assert limits.begin("k", allowance, 0.0) is None
    assert limits.take_tokens("k", 60, 0.0) is None
    assert limits.tokens_left("k", 0.0) == (40, 100)
    assert limits.begin("k", allowance, 0.0, again=True) is None
    assert limits.take_tokens("k", 41, 0.0) is not None
    assert limits.begin("k", allowance, 0.0) is not None
    assert limits.begin("free", Allowance(), 0.0) is None
    assert limits.tokens_left("free", 0.0) is None


def test_concurrency_and_changed_limits() -> None:
    limits = RateLimits()
    assert limits.begin("k", Allowance(max_concurrent=1), 0.0) is None
    assert limits.begin("k", Allowance(max_concurrent=1), 0.0) is not None
    assert limits.begin("k", Allowance(max_concurrent=2), 0.0) is None
    limits.end("k", 0, 1.0)
    limits.end("k", 0, 1.0)
    assert limits.live("k") == 0
    limits.forget_all_but({})
    assert limits.live("k") == 0


@given(
    per_minute=st.integers(1, 1000),
    asked=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 400), st.floats(0, 1)), max_size=60),
)
def test_no_minute_brings_more_than_two_minutes_worth(per_minute: int, asked: list[tuple[float, int, float]]) -> None:
    """A bucket holds one minute and fills by one: no window of 60 s can see more than both."""
    limits, allowance = RateLimits(), Allowance(tokens_per_minute=per_minute)
    now, used = 0.0, []
    for wait_s, tokens, share in asked:
        now += wait_s
        assert limits.begin("k", allowance, now) is None
        taken = limits.take_tokens("k", tokens, now) is None
        spent = int(tokens * share) if taken else 0
        limits.end("k", tokens - spent if taken else 0, now)
        used.append((now, spent))
    for at, _ in used:
        assert sum(spent for t, spent in used if at <= t < at + 60) <= 2 * per_minute + 1e-6
