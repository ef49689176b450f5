"""The API key at the public gRPC port, for every service there: asked before a byte of a request's body is read.

A service that is not named here needs an admin key: a new one is closed until somebody opens it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from router.access.gate import CALLER, Gate
from router.errors import Code, Failure, RequestRefused, refuse
from router.status import abort

_OPEN_TO_ALL = frozenset({"grpc.health.v1.Health"})
_OPEN_TO_KEYS = frozenset(
    {
        "diptych.v1.GenerateService",
        "inference.GRPCInferenceService",
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.reflection.v1.ServerReflection",
    }
)


class Doorman(grpc.aio.ServerInterceptor):
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        service = _service(handler_call_details.method)
        if service in _OPEN_TO_ALL:
            return await continuation(handler_call_details)
        try:
            caller = self._gate.authenticate_one(
                [value for name, value in handler_call_details.invocation_metadata or () if name == "authorization"]
            )
            if service not in _OPEN_TO_KEYS and not caller.admin:
                raise refuse(
                    Code.PERMISSION_DENIED, f"{service} needs an admin key; `diptych keys add --admin` makes one"
                )
        except RequestRefused as error:
            return _refusal(error.failure)
        CALLER.set(caller)  # gRPC runs interceptors and handler of a call in one task
        return await continuation(handler_call_details)


def _service(method: object) -> str:
    """Of `/package.Service/Method`. Whatever else a stranger sends is no service's name, and needs an admin key."""
    parts = method.split("/") if isinstance(method, str) else []
    return parts[1] if len(parts) == 3 and not parts[0] else "this method"


def _refusal(failure: Failure) -> grpc.RpcMethodHandler:
    async def refuse_call(_: Any, context: grpc.aio.ServicerContext) -> None:
        await abort(context, failure)

    return grpc.stream_stream_rpc_method_handler(refuse_call)  # fits every shape: nothing is read
