"""What the router says is what a worker hears."""

from __future__ import annotations

import time
from dataclasses import replace

from diptych.v1 import cluster_pb2, worker_pb2

from router.request import LegStart, Request, Sampling
from router.wire import info_from_wire, said_from_wire, start_to_wire
from worker.wire import start_from_wire


def test_masks_of_tokens_arrive() -> None:
    sampling = Sampling(4, allowed_token_ids=(3, 70_000), bad_words=((5,), (70_000, 6)))
    for asked in (sampling, replace(sampling, allowed_token_ids=(), bad_words=())):
        request = Request("r", [1, 2], asked, 0.0, 9.0)
        wire = start_to_wire(LegStart(1, request, (7,)), 9.0, "").SerializeToString()
        heard = start_from_wire(worker_pb2.StartSequence.FromString(wire))
        assert heard.sampling.allowed_token_ids == asked.allowed_token_ids
        assert heard.sampling.bad_words == asked.bad_words


def test_a_worker_from_before_masks_does_not_say_that_it_knows_them() -> None:
    said = worker_pb2.RegisterRequest(
        worker_id="a",
        role=cluster_pb2.ROLE_DECODE,
        address="a:1",
        block_tokens=16,
        total_blocks=8,
        context_limit_tokens=64,
        vocab_size=100,
    )
    assert not info_from_wire(said).masks_tokens
    said.masks_tokens, said.group = True, "h200"
    assert info_from_wire(said).masks_tokens
    assert info_from_wire(said).group == "h200"


def test_a_weight_arrives_with_its_due_date_and_nonsense_counts_fully() -> None:
    request = Request("r", [1, 2], Sampling(4), 0.0, 9.0)
    wire = start_to_wire(LegStart(1, request, (), due_ms=70.0, put_back_weight=1e-290), 9.0, "")
    assert start_from_wire(wire).put_back_weight == 1e-290
    assert start_from_wire(start_to_wire(LegStart(1, request, ()), 9.0, "")).put_back_weight == 1.0
    for other in (0.0, -1.0, 2.0, float("nan"), float("inf")):
        wire.put_back_weight = other
        assert start_from_wire(wire).put_back_weight == 1.0


def test_what_no_command_can_have_said_of_adapters_is_left_out() -> None:
    now = time.time_ns()
    named = worker_pb2.Adapter(name="sql", digest="a" * 32, directory="/a", stamp=now)
    odd = [
        worker_pb2.Adapter(name="late", digest="a", stamp=2**64 - 1),
        worker_pb2.Adapter(name="late", digest="a", stamp=now + 2 * 24 * 3600 * 10**9),
        worker_pb2.Adapter(name="x" * 257, digest="a"),
        worker_pb2.Adapter(name="x", digest="a" * 65),
        worker_pb2.Adapter(name="x", digest="a", directory="/" * 4097),
        worker_pb2.Adapter(name="x", digest="a", groups=["g"] * 65),
        worker_pb2.Adapter(digest="a"),
    ]
    said = said_from_wire(worker_pb2.AdaptersSaid(adapters=[*odd, named], kept=[*odd, named], gone=[*odd, named]))
    assert [word.name for word in said.adapters] == ["sql"]
    assert said.kept == (("sql", "a" * 32),)
    assert said.gone == (("sql", now),)
