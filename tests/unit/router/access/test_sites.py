"""What a browser's page can do at a router on loopback that asks for no key."""

from __future__ import annotations

import pytest

from router.access.sites import Sites


@pytest.mark.parametrize(
    "host", ["", "localhost", "localhost:8000", "127.0.0.1:8000", "127.0.0.2", "[::1]:8000", "a.localhost", "llm.test"]
)
def test_programs_and_our_own_page(host: str) -> None:
    sites = Sites(["LLM.test"])
    assert sites.refusal("POST", host, "") == ""
    assert sites.refusal("GET", host, "https://evil.example") == "", "a browser does not show it to that page"
    if host:
        assert sites.refusal("POST", host, f"http://{host}") == ""


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "[::", "0.0.0.0",
             "10.0.0.1", "a@localhost@evil.example", "\xff"],
)  # fmt: skip
def test_a_name_that_was_made_to_point_here(host: str) -> None:
    for method in ("GET", "POST"):
        assert "allowed_hosts" in Sites().refusal(method, host, "")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:3000", "http://127.0.0.1", "file://", "x"]
)
def test_blind_posts_of_other_pages(origin: str) -> None:
    assert "cors_origins" in Sites().refusal("POST", "127.0.0.1:8000", origin)
    assert Sites(origins=[origin]).refusal("POST", "127.0.0.1:8000", origin) == ""
    assert Sites(origins=["*"]).refusal("POST", "127.0.0.1:8000", origin) == ""
