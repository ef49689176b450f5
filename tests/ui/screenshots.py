"""Takes the pictures of docs/ui.md.

python -m tests.ui.screenshots http://127.0.0.1:8000    the page, of a running cluster
python -m tests.ui.screenshots                          its scaling part, of a router that is told an hour of decisions
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from diptych.v1 import admin_pb2, admin_pb2_grpc, scaling_pb2
from PIL import Image
from playwright.sync_api import sync_playwright

from settings.model_path import embedded_model_path
from tests.support.prompts import text_of
from tests.ui.pages import opened
from tests.ui.test_page import LoneRouter, posted

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


# Minutes ago, prefill and decode before and after, the policy's rule and reason: a morning that gets busy, and ends.
HOUR = [
    (58, (1, 2, 2, 3), "start", "prompts come faster: 2.1 requests/s expected in 60 s, room for 1.4"),
    (49, (2, 3, 3, 3), "start", "longer prompts: prefill is the narrow place"),
    (37, (3, 3, 3, 5), "start", "longer answers: decode holds 92 % of its KV"),
    (21, (3, 5, 2, 5), "stop", "prefill has had room for one less for 5 minutes"),
    (8, (2, 5, 2, 4), "stop", "decode has had room for one less for 5 minutes"),
    (0.1, (2, 4, 2, 4), "steady", "what there is suffices"),
]


def scaling() -> None:
    router = LoneRouter(embedded_model_path())
    try:
        with grpc.insecure_channel(f"127.0.0.1:{router.router.port}") as channel:
            tell = admin_pb2_grpc.AdminServiceStub(channel).TellScaling
            for number, (minutes, (p, d, more_p, more_d), rule, reason) in enumerate(HOUR, 1):
                before = scaling_pb2.ScalingCounts(prefill=p, decode=d)
                after = scaling_pb2.ScalingCounts(prefill=more_p, decode=more_d)
                changed = before != after
                outcome = "SCALING_OUTCOME_APPLIED" if changed else "SCALING_OUTCOME_UNCHANGED"
                decision = scaling_pb2.ScalingDecision(
                    decider="scaler", number=number, age_ms=minutes * 6e4, interval_s=5.0, before=before, after=after,
                    ready=before, rule=rule, reason=reason, outcome=scaling_pb2.ScalingOutcome.Value(outcome),
                    numbers={"held_gpus": float(p + d), "budget_gpus": 8.0},
                )  # fmt: skip
                tell(admin_pb2.TellScalingRequest(decision=decision))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            with opened(browser, router.base, width=1000) as page:
                page.locator("#scaling-decisions > li").nth(len(HOUR) - 1).wait_for()
                keep(page.locator("#scaling").screenshot(), "ui-scaling")
            browser.close()
    finally:
        router.stop()


def keep(taken: bytes, name: str) -> None:
    Image.open(io.BytesIO(taken)).convert("RGB").quantize(256, kmeans=2).save(IMAGES / f"{name}.png", optimize=True)


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
                keep(page.screenshot(full_page=True), name)
                page.locator("#facts", has_text="ended by").wait_for()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/")) if sys.argv[1:] else scaling()
