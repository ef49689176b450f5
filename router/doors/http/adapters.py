"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them: for operators alone, like `diptych adapters`."""

from __future__ import annotations

from typing import Any

from router.access.gate import Gate
from router.doors.http.app import Exchange
from router.doors.http.errors import ApiError, invalid
from router.operating.adapters import AdapterOperator

_MOST_BYTES = 1 << 16
_OF_LOAD = ("lora_name", "lora_path", "load_inplace", "base_model_name", "is_3d_lora_weight")
_PLAIN = b"text/plain; charset=utf-8"


class AdapterRoutes:
    def __init__(self, operator: AdapterOperator, gate: Gate) -> None:
        self._operator = operator
        self._gate = gate

    async def load(self, exchange: Exchange) -> None:
        body = await self._body(exchange, _OF_LOAD)
        name, path = _text(body, "lora_name"), _text(body, "lora_path")
        inplace = body.get("load_inplace", False)
        if not isinstance(inplace, bool):
            raise invalid("load_inplace", "load_inplace is no boolean; send true or false")
        if body.get("is_3d_lora_weight"):
            raise invalid("is_3d_lora_weight", "adapters of experts are not served; leave is_3d_lora_weight out")
        known = any(one.word.name == name for one in self._operator.listed())
        if known and not inplace:
            why = f"the adapter {name!r} is loaded already; set load_inplace to true to replace it"
            raise ApiError(400, why, param="lora_name", code="adapter_exists")
        served, _ = await self._operator.load(name, path)
        missing = "".join(f"\n{w.worker_id} does not have it: {w.error}" for w in served.workers if w.error)
        said = f"Success: LoRA adapter '{name}' added successfully.{missing}"
        await exchange.respond(200, said.encode(errors="replace"), _PLAIN)

    async def unload(self, exchange: Exchange) -> None:
        body = await self._body(exchange, ("lora_name", "lora_int_id"))
        name = _text(body, "lora_name")
        await self._operator.unload(name)
        said = f"Success: LoRA adapter '{name}' removed successfully."
        await exchange.respond(200, said.encode(errors="replace"), _PLAIN)

    async def _body(self, exchange: Exchange, known: tuple[str, ...]) -> dict[str, Any]:
        self._gate.require_admin()
        body = await exchange.json_object(_MOST_BYTES)
        for name in body:
            if name not in known:
                raise invalid(name[:100], f"{name[:100]!r} is not known here; there are {', '.join(known)}")
        return body


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise invalid(name, f"{name} is missing or no string; send it")
    return value
