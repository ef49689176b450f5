"""Messages that cannot be used end with INVALID_ARGUMENT, cause and fix: gRPC itself says UNKNOWN."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from router.doors.elements import proto_excess
from router.errors import Code, Failure, RequestRefused
from router.status import abort

_SETTINGS_BYTES = 1 << 20  # of a message beside its prompts; every request within the limits of admission fits


@dataclass(frozen=True, slots=True)
class Malformed:
    """A message that is not to be used. Kept as a value, so that the client is told what and why."""

    failure: Failure


def lenient(parse: Callable[[bytes], Any], max_prompt_bytes: int = 0) -> Callable[[bytes], Any]:
    """Without this, a bad string ends as INTERNAL, with no word about the cause; and a message of nothing but empty
    elements would take fifty times its size, and everybody else's time.

    `parse`: `FromString` of a message's class.
    """
    descriptor = getattr(parse, "__self__").DESCRIPTOR  # noqa: B009  the type stubs know it as a function

    def deserialize(data: bytes) -> Any:
        if len(data) > max_prompt_bytes + _SETTINGS_BYTES:
            return Malformed(
                Failure(
                    Code.INVALID_ARGUMENT,
                    f"the message has {len(data)} bytes, the limit is {max_prompt_bytes} for prompts and "
                    f"{_SETTINGS_BYTES} for the rest; send shorter prompts, or fewer in one message",
                )
            )
        if excess := proto_excess(data, descriptor):
            return Malformed(
                Failure(Code.INVALID_ARGUMENT, f"the message has {excess}; send fewer, or several messages")
            )
        try:
            return parse(data)
        except DecodeError as error:
            return Malformed(
                Failure(
                    Code.INVALID_ARGUMENT,
                    f"the message cannot be parsed ({error}); strings must be valid UTF-8, the schema is diptych.v1",
                )
            )

    return deserialize


class LenientServer:
    """Stands in for a server when generated code adds a service: every handler then answers a malformed message."""

    def __init__(self, server: grpc.aio.Server, max_prompt_bytes: int = 0) -> None:
        self._server = server
        self._max_prompt_bytes = max_prompt_bytes

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The same handlers come again, by name."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        own = {name: _lenient_handler(handler, self._max_prompt_bytes) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, own),))


def _lenient_handler(handler: Any, max_prompt_bytes: int) -> grpc.RpcMethodHandler:
    for shape in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        serve = getattr(handler, shape)
        if serve is not None:
            make = getattr(grpc, f"{shape}_rpc_method_handler")
            parse = lenient(handler.request_deserializer, max_prompt_bytes)
            return make(_answering(serve), parse, handler.response_serializer)
    raise AssertionError("a handler without a method")


def _answering(serve: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    if inspect.isasyncgenfunction(serve):

        async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                async for response in serve(_usable(request), context):
                    yield response
            except RequestRefused as error:
                await abort(context, error.failure)

        return stream

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await serve(_usable(request), context)
        except RequestRefused as error:
            await abort(context, error.failure)

    return call


def _usable(request: Any) -> Any:
    """Raises RequestRefused: at once, or, for a stream of requests, when it comes to the message."""
    if isinstance(request, Malformed):
        raise RequestRefused(request.failure)
    return _usable_each(request) if isinstance(request, AsyncIterator) else request


async def _usable_each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _usable(request)
