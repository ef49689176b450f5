"""The status and playground page in headless Chromium."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.v1 import admin_pb2, admin_pb2_grpc, cluster_pb2, scaling_pb2, worker_pb2, worker_pb2_grpc

from router.access.keys import KeyEntry, KeyFile, new_key, write_keys
from router.config import RouterConfig
from router.server import RunningRouter, serve
from settings.security import SecurityConfig
from tests.support.processes import Cluster
from tests.support.prompts import text_of
from tests.ui.pages import fits, opened, phases

MARKUP = "<img src=x onerror=alert(1)>"


def posted(base: str, path: str, body: dict[str, Any], **headers: str) -> Any:
    request = urllib.request.Request(
        base + path, json.dumps(body).encode(), {"content-type": "application/json", **headers}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.mark.timeout(180)
def test_pools_and_a_streamed_answer_with_its_bar(cluster: Cluster, browser: Any) -> None:
    base = f"http://127.0.0.1:{cluster.http_port}"
    prompt, model = text_of(60, 31), cluster.cluster().router.model
    body = {"model": model, "prompt": prompt, "max_tokens": 30, "temperature": 0}
    expected = posted(base, "/v1/completions", body)["choices"][0]["text"]
    with opened(browser, base) as page:
        page.wait_for_selector("#state.good")
        for role in ("prefill", "decode"):
            card = page.locator(f"#{role} .worker")
            assert card.count() == 1
            assert card.locator("b").inner_text() == f"{role}-0"
            assert card.locator(".state").inner_text() == "ready"
            assert "% KV" in card.locator(".numbers").inner_text()
        page.fill("#prompt", prompt)
        page.select_option("#kind", "text")
        page.select_option("#placement", "split")
        page.fill("#max-tokens", "30")
        page.click("#send")
        page.locator("#facts", has_text="ended by length").wait_for()
        assert page.locator("#answer").evaluate("e => e.textContent") == expected
        assert page.locator("#answer span").count() > 5, "it came in pieces"
        assert page.locator("#ticks line").count() == page.locator("#answer span").count()

        row = page.locator("#requests li.mine")
        row.locator(".outcome", has_text="length").wait_for()
        assert row.locator(".route").inner_text() == "prefill-0 → decode-0"
        assert row.locator(".why").inner_text() == "asked to be split"
        widths = phases(row)
        assert set(widths) == {"queue", "prefill", "transfer", "decode"}
        assert widths["decode"] > widths["transfer"]
        row.locator("summary").click()
        row.locator("td", has_text="split ttft").wait_for()
        assert "KV there before prefill ended" in row.locator(".detail").inner_text()
        assert fits(page)


@pytest.mark.long
@pytest.mark.timeout(180)
def test_stop_cancels_and_a_refusal_is_shown(cluster: Cluster, browser: Any) -> None:
    with opened(browser, f"http://127.0.0.1:{cluster.http_port}", width=400, dark=True, quiet=False) as page:
        page.wait_for_selector("#state.good")
        page.select_option("#kind", "text")
        page.fill("#prompt", text_of(60, 31))
        page.fill("#max-tokens", "4000")
        page.click("#send")
        page.locator("#answer span").nth(3).wait_for()
        page.click("#stop")
        page.locator("#requests li.mine .outcome", has_text="cancelled").wait_for()
        assert page.locator("#facts").inner_text() == "stopped"
        page.fill("#prompt", "")
        page.click("#send")
        page.locator("#answer .bad").wait_for()
        assert "prompt is empty" in page.locator("#answer .bad").inner_text()
        assert fits(page)
    cluster.assert_nothing_left()


class LoneRouter:
    """A router in this process that no worker serves."""

    def __init__(self, model: Path, security: SecurityConfig | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        config = RouterConfig(model=str(model), grpc_port=0, internal_port=0, http_port=0)
        self.router: RunningRouter = self._run(serve(config, security))
        assert self.router.http is not None
        self.base = f"http://127.0.0.1:{self.router.http.port}"
        self._stopped = False

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._run(self.router.stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()


@pytest.fixture
def lone(model_path: Path) -> Iterator[LoneRouter]:
    router = LoneRouter(model_path)
    try:
        yield router
    finally:
        router.stop()


@pytest.mark.long
def test_a_router_that_nobody_serves_and_then_is_gone(lone: LoneRouter, browser: Any) -> None:
    with opened(browser, lone.base, width=400, quiet=False) as page:
        page.wait_for_selector("#state.warn", state="visible")
        page.locator("#notice", has_text="no decode worker is ready").wait_for()
        assert page.locator("#decode .empty").inner_text().startswith("No worker has registered")
        assert page.locator("#no-requests").is_visible()
        assert page.locator("#send").is_disabled()
        assert fits(page)
        lone.stop()
        page.locator("#state", has_text="unreachable").wait_for()
        assert "does not answer" in page.locator("#notice").inner_text()
        assert fits(page)


def test_text_from_elsewhere_is_never_markup(lone: LoneRouter, browser: Any) -> None:
    """A worker may call itself anything."""
    with grpc.insecure_channel(f"127.0.0.1:{lone.router.internal_port}") as channel:
        worker_pb2_grpc.RegistryServiceStub(channel).Register(
            worker_pb2.RegisterRequest(
                worker_id=MARKUP,
                epoch=1,
                role=cluster_pb2.ROLE_DECODE,
                address="127.0.0.1:1",
                model=lone.router.dispatcher.model_name,
                block_tokens=32,
                total_blocks=8,
                context_limit_tokens=512,
                vocab_size=49152,
                device=MARKUP,
            )
        )
    with opened(browser, lone.base, width=400) as page:
        card = page.locator("#decode .worker")
        card.wait_for()
        assert card.locator("b").inner_text() == MARKUP
        assert page.locator("#decode img").count() == 0
        assert not page.locator("#scaling").is_visible(), "nobody decides"
        assert fits(page)


def decided(number: int, age_s: float, pairs: tuple[int, int, int, int], **more: Any) -> admin_pb2.TellScalingRequest:
    before, after = (scaling_pb2.ScalingCounts(prefill=p, decode=d) for p, d in (pairs[:2], pairs[2:]))
    given: dict[str, Any] = {"rule": "start", "reason": "short", "outcome": scaling_pb2.SCALING_OUTCOME_APPLIED, **more}
    decision = scaling_pb2.ScalingDecision(
        decider=MARKUP, number=number, age_ms=age_s * 1e3, interval_s=5.0, before=before, after=after, ready=before,
        numbers={"held_gpus": 4.0, "budget_gpus": 8.0}, **given,
    )  # fmt: skip
    return admin_pb2.TellScalingRequest(decision=decision)


def test_scaling_decisions_and_counts_over_time(lone: LoneRouter, browser: Any) -> None:
    weighed = [scaling_pb2.ScalingAlternative(prefill=0, decode=2, prefill_strain=math.inf, what="stop", verdict="no")]
    unchanged = scaling_pb2.SCALING_OUTCOME_UNCHANGED
    with grpc.insecure_channel(f"127.0.0.1:{lone.router.port}") as channel:
        tell = admin_pb2_grpc.AdminServiceStub(channel).TellScaling
        tell(decided(1, 900.0, (2, 2, 3, 2), alternatives=weighed))
        tell(decided(2, 600.0, (3, 2, 2, 2), rule="stop", outcome=scaling_pb2.SCALING_OUTCOME_FAILED, error=MARKUP))
        tell(decided(3, 3.0, (3, 2, 3, 2), rule="steady", reason="enough", outcome=unchanged))
    with opened(browser, lone.base, width=400) as page:
        rows = page.locator("#scaling-decisions > li")
        rows.nth(2).wait_for()
        pairs = [rows.nth(i).locator(".route").inner_text() for i in range(3)]
        assert pairs == ["3 + 2", "3 + 2 → 2 + 2", "2 + 2 → 3 + 2"]
        assert rows.nth(0).locator(".why").inner_text() == "enough"
        assert rows.nth(1).locator(".error").inner_text() == MARKUP
        assert "4 of 8 GPUs held" in page.locator("#scaling-by").inner_text()
        rows.nth(2).locator("summary").click()
        rows.nth(2).locator("td", has_text="0 + 2, stop: no").wait_for()
        assert "∞ / 0" in rows.nth(2).locator(".detail").inner_text()
        captions = page.locator("#scaling-charts figcaption")
        assert captions.nth(0).inner_text() == "Prefill: 3 wanted, 3 present"
        wanted = page.locator("#scaling-charts .prefill polyline.wanted").get_attribute("points").split()
        heights = [float(point.split(",")[1]) for point in wanted]
        assert len(wanted) == 6
        assert heights[0] == heights[1] < heights[2] == heights[3] > heights[4], (
            "three, then two, then three: up is less"
        )
        assert page.locator("#scaling img").count() == 0
        assert fits(page)


@pytest.mark.long
def test_a_router_with_keys_shows_the_page_and_nothing_else(tmp_path: Path, model_path: Path, browser: Any) -> None:
    admin, user = new_key(bytes(38)), new_key(bytes(range(38)))
    entries = [
        KeyEntry(id=admin[1], sha256=admin[2], tenant="operators", admin=True),
        KeyEntry(id=user[1], sha256=user[2], tenant="someone"),
    ]
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=tuple(entries)))
    router = LoneRouter(model_path, SecurityConfig(api_keys=str(tmp_path / "keys.yaml")))
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(router.base + "/ui/cluster", timeout=10)
        with opened(browser, router.base, width=400, quiet=False) as page:
            page.locator("#state", has_text="key needed").wait_for()
            assert not page.locator("#decode").is_visible()
            assert fits(page)
            page.fill("#key", user[0])
            page.click("#key-form button")
            page.locator("#state", has_text="playground only").wait_for()
            assert "needs an admin key" in page.locator("#notice").inner_text()
            page.fill("#key", admin[0])
            page.click("#key-form button")
            page.locator("#notice", has_text="no decode worker is ready").wait_for()
            assert page.locator("#decode").is_visible()
            assert not page.locator("#key-form").is_visible()
    finally:
        router.stop()


def test_headers_and_unknown_files(lone: LoneRouter) -> None:
    with urllib.request.urlopen(lone.base + "/", timeout=10) as response:
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    for path in ("/ui/../config.py", "/ui/%2e%2e/config.py", "/ui/nothing.js"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(lone.base + path, timeout=10)
