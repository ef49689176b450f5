"""The page's routes: what is served, and how often the cluster is written out."""

from __future__ import annotations

import asyncio
import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
from diptych.v1 import cluster_pb2

from router.access.gate import Gate
from router.access.keys import KeyEntry, KeyTable, new_key
from router.doors.http.app import App
from router.doors.http.errors import ApiError
from router.doors.http.ui import FILES, UiRoutes
from router.errors import Code, RequestRefused


class Exchange:
    """Keeps the response."""

    def __init__(self, tail: str = "") -> None:
        self.tail = tail
        self.body = b""

    async def respond(self, status: int, body: bytes, content_type: bytes, headers: Any) -> None:
        assert status == 200
        self.body, self.content_type, self.headers = body, content_type, dict(headers)


async def test_however_many_look_the_cluster_is_written_out_twice_a_second() -> None:
    now, looks = 0.0, 0

    def cluster() -> cluster_pb2.Cluster:
        nonlocal looks
        looks += 1
        return cluster_pb2.Cluster(router=cluster_pb2.RouterState(model="m", requests_total=looks))

    routes: Any = UiRoutes(cluster, cluster_pb2.GetScalingResponse, lambda: now)
    exchanges = [Exchange() for _ in range(20)]
    await asyncio.gather(*[routes.show_cluster(e) for e in exchanges])
    assert looks == 1
    shown = [json.loads(e.body) for e in exchanges]
    assert all(s["router"]["model"] == "m" for s in shown)
    assert shown[0]["recent"] == [], "what is empty is there too: the page asks no question twice"
    now = 0.6
    await routes.show_cluster(exchanges[0])
    assert json.loads(exchanges[0].body)["router"]["requests_total"] == "2"


async def test_only_the_pages_own_files_are_served() -> None:
    routes: Any = UiRoutes(cluster_pb2.Cluster, cluster_pb2.GetScalingResponse)
    for name in ("page.js", "play.js", "scaling.js", "style.css", "icon.svg", "index.html"):
        exchange = Exchange(name)
        await routes.file(exchange)
        assert exchange.body == (FILES / name).read_bytes()
        assert b"default-src 'none'" in exchange.headers[b"content-security-policy"]
    for name in ("", "__init__.py", "../config.py", "/etc/passwd", "page.js/"):
        with pytest.raises(ApiError, match="does not exist"):
            await routes.file(Exchange(name))


@pytest.mark.parametrize("path", ["/ui/cluster", "/ui/scaling", "/ui/what_comes_next", "/metrics"])
def test_what_shows_figures_needs_an_admin_key_and_files_need_none(path: str) -> None:
    keys = {name: new_key(bytes([i] * 38)) for i, name in enumerate(("admin", "user"))}
    entries = [KeyEntry(id=key[1], sha256=key[2], tenant=name, admin=name == "admin") for name, key in keys.items()]
    app: Any = App(random.Random(0), [], Gate(KeyTable(entries)))

    def ask(path: str, key: str = "") -> None:
        headers = [f"Bearer {key}".encode()] if key else []
        app._let_in(SimpleNamespace(path=path, method="GET", all=lambda name: headers))

    for file in ("/", "/ui/page.js", "/ui/style.css", "/health"):
        ask(file)
    ask(path, keys["admin"][0])
    for code, key in ((Code.UNAUTHENTICATED, ""), (Code.PERMISSION_DENIED, keys["user"][0])):
        with pytest.raises(RequestRefused) as refused:
            ask(path, key)
        assert refused.value.failure.code is code


def test_nothing_is_inline_or_from_elsewhere() -> None:
    page = (FILES / "index.html").read_text()
    assert "style=" not in page
    assert "onclick" not in page
    assert "<script>" not in page
    for path in FILES.iterdir():
        text = path.read_text()
        assert "https://" not in text, path
        assert "innerHTML" not in text, path
