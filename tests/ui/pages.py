"""One open page, which must cause no error, load nothing from elsewhere and fit its width."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def opened(browser: Any, base: str, *, width: int = 1100, dark: bool = False, quiet: bool = True) -> Iterator[Any]:
    """`quiet`: nothing may be written to the console (a router that is gone makes Chromium complain)."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(base + "/")
        yield page
        assert all(url.startswith(base) for url in asked), asked
        assert not [line for line in said if quiet or line.startswith("error:")], said
    finally:
        context.close()


def fits(page: Any) -> bool:
    """Nothing has to be scrolled sideways."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def phases(row: Any) -> dict[str, float]:
    """Width in pixels of each phase of a request's bar."""
    spans = row.locator(".bar span")
    return {spans.nth(i).get_attribute("class"): spans.nth(i).bounding_box()["width"] for i in range(spans.count())}
