"""Reflection has two names, and each is described."""

from __future__ import annotations

from google.protobuf import descriptor_pool

from router.doors.grpc.reflection import REFLECTION, add_reflection


class Server:
    def __init__(self) -> None:
        self.services: dict[str, list[str]] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        raise AssertionError("they would come twice")

    def add_registered_method_handlers(self, service: str, handlers: dict[str, object]) -> None:
        self.services[service] = list(handlers)


def test_both_versions_are_served_and_described() -> None:
    for _ in range(2):  # two routers in one process share the pool of descriptions
        server = Server()
        add_reflection(("a.B",), server)
        assert server.services == {name: ["ServerReflectionInfo"] for name in REFLECTION}
    for name in REFLECTION:
        service = descriptor_pool.Default().FindServiceByName(name)
        (method,) = service.methods
        assert method.input_type.full_name == f"{name.rpartition('.')[0]}.ServerReflectionRequest"
        assert [f.name for f in method.input_type.fields][:2] == ["host", "file_by_filename"]
