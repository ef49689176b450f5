"""A request may go on with any worker: a router serves one set of weights at a time, whatever name they go by. For an
upgrade it may be told to serve two beside each other (tests/unit/router/placement/test_revisions.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from router.errors import RequestRefused
from router.placement.cluster import Role, WorkerInfo
from router.placement.policy import WorkerKey
from tests.support.in_process_router import InProcessRouter


@pytest.fixture
def dispatcher(running: InProcessRouter) -> Any:
    return running.router.dispatcher


def worker(dispatcher: Any, name: str, identity: str, epoch: int = 1) -> WorkerInfo:
    shape = ("host:1", dispatcher.model_name, "kv", 32, 1024, 100, 8192, 1000)
    return replace(WorkerInfo(WorkerKey(name, epoch), Role.DECODE, *shape), model_identity=identity)


def test_other_weights_under_the_same_name_are_refused_while_these_serve(dispatcher: Any) -> None:
    one, same, other = (worker(dispatcher, n, i) for n, i in (("d-0", "a" * 32), ("d-1", "a" * 32), ("d-2", "b" * 32)))
    dispatcher.register(one)
    dispatcher.cluster.registered(one, 0.0, leaving=False)
    quantized = replace(other, dtype="bfloat16 int8 mlp")
    try:
        dispatcher.register(same)
        with pytest.raises(RequestRefused, match=r"d-2 holds other weights .bbbbbbbb bfloat16 int8 mlp. than d-0"):
            dispatcher.register(quantized)
        dispatcher.register(worker(dispatcher, "d-3", ""))  # of a version that does not say
        with pytest.raises(RequestRefused, match=r"d-2 holds other weights .bbbbbbbb. than d-0, which serves here"):
            dispatcher.register(other)
        dispatcher.register(one)  # a heartbeat
        dispatcher.register(worker(dispatcher, "d-0", "b" * 32, epoch=2))  # it came back with others, and is alone
    finally:
        dispatcher.cluster.forget(one.key)
    dispatcher.register(other)


def test_live_requests_are_not_continued_by_other_weights(dispatcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher.register(worker(dispatcher, "d-0", "a" * 32))
    monkeypatch.setitem(dispatcher._live, "a request that waits for a worker", object())
    dispatcher.register(worker(dispatcher, "d-1", "a" * 32))
    with pytest.raises(RequestRefused, match=r"other weights .bbbbbbbb. than those that live requests began with"):
        dispatcher.register(worker(dispatcher, "d-2", "b" * 32))
    monkeypatch.undo()
    dispatcher.register(worker(dispatcher, "d-2", "b" * 32))
