"""How many routers there are, by the workers' word, and what that does to a key's limits."""

from __future__ import annotations

from router.access.other_routers import OtherRouters
from router.access.rate_limit import Allowance, RateLimits


def test_routers_are_known_by_what_workers_say_and_forgotten_with_their_word() -> None:
    now = [0.0]
    routers = OtherRouters(lambda: now[0])
    routers.own_id = "a:8100"
    assert (routers.ids(), routers.count()) == ([], 1)
    routers.heard("d-0", ["a:8100", "b:8100"])
    routers.heard("d-1", ["a:8100", "c:8100"])
    now[0] = 1.0
    assert (routers.ids(), routers.count()) == (["b:8100", "c:8100"], 3)
    routers.heard("d-1", ["a:8100"])
    now[0] = 2.0
    assert routers.ids() == ["b:8100"], "c left, as d-1 says"
    now[0] = 20.0
    assert routers.count() == 1, "nobody has said anything for long"


def test_a_key_s_limits_are_shared_out_and_kept_by_all_together() -> None:
    whole = Allowance(requests_per_minute=10, tokens_per_minute=900, max_concurrent=1)
    assert whole.shared_by(1) is whole
    assert whole.shared_by(3) == Allowance(3, 300, 1, 3)
    assert Allowance().shared_by(3) == Allowance(routers=3), "no limit stays none"
    limits = RateLimits()
    part = whole.shared_by(2)
    assert limits.begin("k", part, 0.0) is None
    over = limits.begin("k", part, 0.0)
    assert over is not None
    assert "which is its limit at each of 2 routers" in over.what
    limits.end("k", 0, 0.0)


def test_a_part_grows_when_a_router_leaves() -> None:
    whole, limits = Allowance(requests_per_minute=4), RateLimits()
    for _ in range(2):
        assert limits.begin("k", whole.shared_by(2), 0.0) is None
    assert limits.begin("k", whole.shared_by(2), 0.0) is not None
    for _ in range(2):
        assert limits.begin("k", whole, 0.0) is None
    assert limits.begin("k", whole, 0.0) is not None
