"""Which services there are, for grpcurl and its like: v1, and v1alpha for those that know only that.

The two have the same messages under two names, and grpcio has the older one only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

_ALPHA, _V1 = "grpc.reflection.v1alpha", "grpc.reflection.v1"
REFLECTION = (f"{_V1}.ServerReflection", f"{_ALPHA}.ServerReflection")


def add_reflection(names: Sequence[str], server: Any) -> None:
    """`names` of all services, beside reflection itself. `server`: what generated code adds services to."""
    _describe_v1()
    servicer = reflection.aio.ReflectionServicer((*names, *REFLECTION))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, _UnderBothNames(server))


def _describe_v1() -> None:
    """Whoever lists the services asks for the description of each."""
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(REFLECTION[0])
        return
    except KeyError:
        pass
    v1 = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(v1)
    v1.name, v1.package = "grpc/reflection/v1/reflection.proto", _V1
    for message in v1.message_type:
        for field in message.field:
            if not field.type_name:
                continue  # a plain type; also an empty name would be one
            field.type_name = field.type_name.replace(f".{_ALPHA}.", f".{_V1}.")
    for service in v1.service:
        for method in service.method:
            method.input_type = method.input_type.replace(f".{_ALPHA}.", f".{_V1}.")
            method.output_type = method.output_type.replace(f".{_ALPHA}.", f".{_V1}.")
    pool.Add(v1)


class _UnderBothNames:
    """Stands in for a server when generated code adds the service."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The same handlers come again, by name."""

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        for name in REFLECTION:
            self._server.add_registered_method_handlers(name, handlers)
