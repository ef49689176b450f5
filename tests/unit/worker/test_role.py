"""A worker keeps its role, and says it to every router alike."""

from __future__ import annotations

from diptych.v1 import cluster_pb2, worker_pb2

from tests.support.pair import LINK, Pair
from worker.messages import LinkOutput, RoleSaid, RouterCommands, RouterConnected, SetRole
from worker.wire import commands_from_wire, output_to_wire


def said(core: object, link: int = LINK) -> RoleSaid | None:
    outbox = core.take_outbox()  # type: ignore[attr-defined]
    return outbox.links[link].role if outbox is not None and link in outbox.links else None


def test_every_router_hears_what_one_of_them_asked_for() -> None:
    core = Pair().d.core
    core.role = RoleSaid("decode")
    core.handle(RouterConnected(8), 0.0)
    assert said(core, 8) == ("decode", 0)
    core.handle(RouterCommands(8, (SetRole("prefill"),)), 1.0)
    outbox = core.take_outbox()
    assert outbox is not None
    assert outbox.links[8].role == outbox.links[LINK].role == ("prefill", 1)
    core.handle(RouterCommands(8, (SetRole("prefill"),)), 2.0)
    assert said(core, 8) == ("prefill", 1), "asked again, it says so again"
    core.handle(RouterCommands(LINK, (SetRole("standby"),)), 3.0)
    assert said(core) == ("standby", 2)
    core.handle(RouterConnected(9), 4.0)
    assert said(core, 9) == ("standby", 2)


def test_the_wire_says_it_and_an_unknown_role_is_no_command() -> None:
    message = output_to_wire(LinkOutput(role=RoleSaid("standby", 3)), 1, 0.0)
    assert (message.role, message.role_changes) == (cluster_pb2.ROLE_STANDBY, 3)
    assert output_to_wire(LinkOutput(), 1, 0.0).role == cluster_pb2.ROLE_UNSPECIFIED
    request = worker_pb2.ConnectRequest(set_role=cluster_pb2.ROLE_PREFILL)
    assert commands_from_wire(request) == (SetRole("prefill"),)
    assert commands_from_wire(worker_pb2.ConnectRequest(set_role=99)) == ()  # type: ignore[arg-type]


def test_what_waits_to_be_written_keeps_the_last_word() -> None:
    output = LinkOutput(role=RoleSaid("decode", 1))
    output.merge(LinkOutput())
    assert output.role == ("decode", 1)
    output.merge(LinkOutput(role=RoleSaid("prefill", 2)))
    assert output.role == ("prefill", 2)
