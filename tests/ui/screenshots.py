"""Takes the pictures of docs/ui.md from a running cluster: python -m tests.ui.screenshots http://127.0.0.1:8000."""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.support.prompts import text_of
from tests.ui.pages import opened
from tests.ui.test_page import posted

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"


def traffic(base: str) -> None:
    """A few requests of several kinds, so that there is something to see."""
    with urllib.request.urlopen(base + "/v1/models", timeout=10) as response:
        model = json.load(response)["data"][0]["id"]
    wanted = [
        (600, 24, "auto"),
        (20, 40, "auto"),
        (300, 30, "split"),
        (20, 12, "local"),
        (600, 24, "auto"),
        (250, 48, "split"),
    ]

    def ask(i: int) -> None:
        words, tokens, placement = wanted[i]
        body = {"model": model, "prompt": text_of(words, i), "max_tokens": tokens, "temperature": 0}
        posted(base, "/v1/completions", body, **{"x-diptych-placement": placement})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, range(len(wanted))))


def main(base: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    traffic(base)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, dark, width in (("ui-light", False, 1000), ("ui-dark", True, 1000), ("ui-narrow", False, 400)):
            with opened(browser, base, dark=dark, width=width) as page:
                page.wait_for_selector("#state.good")
                page.fill("#max-tokens", "60")
                page.click("#send")
                page.locator("#answer span").nth(25).wait_for()
                time.sleep(1.2)  # for a look at the cluster while the answer is written
                taken = Image.open(io.BytesIO(page.screenshot(full_page=True)))
                taken.convert("RGB").quantize(256, kmeans=2).save(IMAGES / f"{name}.png", optimize=True)
                page.locator("#facts", has_text="ended by").wait_for()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
