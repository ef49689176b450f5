"""What the HTTP port answers. A new route is a line here and a handler in a file of its own."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

from router.dispatcher import Dispatcher
from router.doors.http.adapters import AdapterRoutes
from router.doors.http.app import App, Exchange
from router.doors.http.chat import ChatRoutes
from router.doors.http.completions import CompletionRoutes
from router.doors.http.errors import ApiError
from router.doors.http.logprobs import TokenNames
from router.doors.http.models import ModelRoutes
from router.doors.http.responses import ResponseRoutes
from router.doors.http.text import TextRoutes
from router.operating.adapters import AdapterOperator

_SETTINGS_BYTES = 1 << 20  # of a body beside its prompt
METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


def add_routes(
    app: App,
    dispatcher: Dispatcher,
    *,
    not_serving_reason: Callable[[], str],
    metrics: Callable[[], bytes] | None = None,
    adapters: AdapterOperator | None = None,
) -> None:
    """`metrics`: the body of /metrics, computed when asked. `adapters`: of who loads them; None: nobody here."""

    async def health(exchange: Exchange) -> None:
        reason = not_serving_reason()
        if reason:
            raise ApiError(503, reason, code="not_serving", retry_after_ms=1000)
        await exchange.respond_json({"status": "ok"})

    async def show_version(exchange: Exchange) -> None:
        await exchange.respond_json({"version": importlib.metadata.version("diptych")})

    async def show_metrics(exchange: Exchange) -> None:
        if metrics is None:
            raise ApiError(404, "this router keeps no metrics", code="unknown_url")
        await exchange.respond(200, metrics(), METRICS_TYPE)

    models = ModelRoutes(dispatcher)
    limit_bytes = dispatcher.config.max_prompt_bytes + _SETTINGS_BYTES
    text = TextRoutes(dispatcher, limit_bytes)
    names = TokenNames(dispatcher.tokenizer.texts)
    app.route("POST", "/v1/chat/completions", ChatRoutes(dispatcher, names, limit_bytes).create)
    app.route("POST", "/v1/completions", CompletionRoutes(dispatcher, names, limit_bytes).create)
    app.route("POST", "/v1/responses", ResponseRoutes(dispatcher, names, limit_bytes).create)
    app.route("GET", "/health", health)
    app.route("GET", "/version", show_version)
    app.route("GET", "/metrics", show_metrics)
    app.route("GET", "/v1/models", models.list)
    app.route("GET", "/v1/models/*", models.one)
    if adapters is not None:
        loading = AdapterRoutes(adapters, dispatcher.gate)
        app.route("POST", "/v1/load_lora_adapter", loading.load)
        app.route("POST", "/v1/unload_lora_adapter", loading.unload)
    app.route("POST", "/tokenize", text.tokenize)
    app.route("POST", "/detokenize", text.detokenize)
