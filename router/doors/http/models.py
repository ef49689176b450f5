"""/v1/models: the one model that is served, and its adapters."""

from __future__ import annotations

import time
from typing import Any

from router.dispatcher import Dispatcher
from router.doors.http.app import Exchange
from router.doors.http.errors import ApiError


class ModelRoutes:
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._created = int(time.time())

    def _models(self) -> list[dict[str, Any]]:
        """One for each of its names, as far as the caller may use it."""
        served = self._dispatcher.served_model()
        gate = self._dispatcher.gate
        caller = gate.current()
        named = [(name, None) for name in (served.own_names if gate.may_use(caller, served.own_names) else ())]
        named += [(name, served.name) for name in served.adapters if gate.may_use(caller, (name,))]
        return [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "diptych",
                "max_model_len": served.context_limit_tokens,  # vLLM's word; load tools ask for it
                **({} if parent is None else {"parent": parent}),  # vLLM's, too
            }
            for name, parent in named
        ]

    async def list(self, exchange: Exchange) -> None:
        await exchange.respond_json({"object": "list", "data": self._models()})

    async def one(self, exchange: Exchange) -> None:
        model = next((model for model in self._models() if model["id"] == exchange.tail), None)
        if model is None:
            served = " or ".join(map(repr, self._dispatcher.model_names))
            message = f"model {exchange.tail[:100]!r} is not served here; served is {served}"
            raise ApiError(404, message, param="model", code="model_not_found")
        await exchange.respond_json(model)
