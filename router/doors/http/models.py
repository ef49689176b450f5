"""/v1/models: the one model that is served."""

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

    def _model(self) -> dict[str, Any]:
        served = self._dispatcher.served_model()
        return {
            "id": served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "diptych",
            "max_model_len": served.context_limit_tokens,  # vLLM's word; load tools ask for it
        }

    def _may_use(self, name: str) -> bool:
        gate = self._dispatcher.gate
        return gate.may_use(gate.current(), name)

    async def list(self, exchange: Exchange) -> None:
        model = self._model()
        await exchange.respond_json({"object": "list", "data": [model] if self._may_use(model["id"]) else []})

    async def one(self, exchange: Exchange) -> None:
        model = self._model()
        if exchange.tail != model["id"] or not self._may_use(model["id"]):
            message = f"model {exchange.tail[:100]!r} is not served here; served is {model['id']!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        await exchange.respond_json(model)
