"""What a client may ask for, as far as the workers' pools set a limit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from checkpoint.generation import SamplingDefaults
from kv_transfer.layout import FULL, Group, KvLayout, Rule
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.lifecycle import Life
from router.placement.adapter_words import said_at_start
from router.placement.cluster import Role, WorkerInfo
from router.placement.policy import Placement, Rejection, RequestFacts, Route, WorkerKey
from router.record.tracing import RequestTrace
from router.request import LegStart, Request, Sampling

BLOCK, LIMIT = 16, 4096


class Wire:
    """To the workers: what they are asked to start."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, LegStart]] = []
        self.follows: list[str] = []

    def start(self, worker: WorkerKey, start: LegStart, deadline_s: float) -> None:
        self.starts.append((worker.worker_id, start))

    def follow(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...], pull: tuple[str, WorkerKey]) -> None:
        self.follows.append(f"{worker.worker_id} from {pull[1].worker_id}")

    def cancel(self, worker: WorkerKey, leg: int, reason: str, keep_lease: bool) -> None: ...


def group(rule: Rule) -> Group:
    return Group(rule, (0,), 1, 8, "float32")


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    tokenizer: Any = SimpleNamespace(
        name="tiny", sampling_defaults=SamplingDefaults(), chat_template_text="", special_ids=lambda _: {},
        build_llguidance=None, eos_token_ids=frozenset(), vocab_size=100, context_limit_tokens=LIMIT,
        longest_token_chars=4, texts=Mock(),
    )  # fmt: skip
    config, timers = RouterConfig(mixed_quantization=True), cast("Any", lambda *_: Mock())
    made = Dispatcher(config, tokenizer, cast("Any", Wire()), random.Random(1), lambda: 0.0, timers)
    yield made
    made.close()


def with_worker(dispatcher: Dispatcher, rules: tuple[Rule, ...], blocks: int) -> WorkerInfo:
    layout = KvLayout("m", BLOCK, tuple(map(group, rules)))
    shape = ("host:1", "tiny", "kv", BLOCK, layout.growing_bytes, blocks, LIMIT, 100)
    made = WorkerInfo(WorkerKey("d", 1), Role.DECODE, *shape, kept_tokens=layout.kept_tokens)
    dispatcher.cluster.registered(made, 0.0, leaving=False)
    dispatcher.cluster.connected(made.key, 0.0)
    return made


@pytest.mark.parametrize(
    ("rules", "blocks", "longest"),
    [
        ((FULL,), 10, 160),
        ((FULL, Rule(window=32)), 10, 160),
        ((FULL, Rule(state=True)), 10, 160),
        ((Rule(window=32),), 10, LIMIT),  # three blocks of it are held at a time
        ((Rule(window=32),), 3, LIMIT),
        ((Rule(window=32),), 2, 32),
        ((Rule(window=32), Rule(chunk=64)), 5, LIMIT),
        ((Rule(window=32), Rule(chunk=64)), 4, 64),
        ((Rule(window=40), Rule(state=True)), 10, LIMIT),
    ],
)
def test_the_limit_is_what_the_engine_can_hold(
    dispatcher: Dispatcher, rules: tuple[Rule, ...], blocks: int, longest: int
) -> None:
    """Held to engine/kv_groups.py, which refuses what can never run."""
    from engine.block_pool import BlockPool
    from engine.kv_groups import KvGroups

    with_worker(dispatcher, rules, blocks)
    model = dispatcher.served_model()
    assert model.context_limit_tokens == longest
    assert model.limit_is == (
        "the context limit" if longest == LIMIT else "the limit of the largest decode worker's KV pool"
    )
    engine = KvGroups(rules, BlockPool([blocks] * len(rules)), BLOCK)
    assert not engine.lacks(longest)
    assert longest == LIMIT or engine.lacks(longest + 1)
    for tokens in (1, longest // 2, longest - 1):
        assert isinstance(dispatcher.decide(RequestFacts(tokens, longest - tokens)), Route)


def test_what_windows_have_left_takes_no_room(dispatcher: Dispatcher) -> None:
    one = with_worker(dispatcher, (Rule(window=32),), 10)
    assert [one.blocks_of(n) for n in (1, 16, 17, 48, 49, 4000)] == [1, 1, 2, 3, 3, 3]
    (view,) = dispatcher.cluster.view().decode
    assert min(view.total_tokens, view.free_tokens) > LIMIT
    dispatcher.cluster.forget(one.key)
    full = with_worker(dispatcher, (FULL,), 10)
    assert full.blocks_of(4000) == 250
    assert isinstance(dispatcher.decide(RequestFacts(161, 10)), Rejection)


def test_what_a_name_stood_for_is_known_while_a_worker_has_it(dispatcher: Dispatcher) -> None:
    """Answers that began on it go on with it (router/admission.py)."""
    one = with_worker(dispatcher, (FULL,), 10)
    for name, digest in (("d1", "a"), ("d2", "b"), ("d3", "b")):
        info = replace(one, key=WorkerKey(name, 1), adapters=said_at_start(("sql", digest)))
        dispatcher.cluster.registered(info, 0.0, leaving=False)
        dispatcher.cluster.connected(info.key, 0.0)
    model = dispatcher.served_model()
    assert (model.adapters, model.older) == ({"sql": "b"}, {"sql": {"a"}})


@pytest.mark.parametrize("again", ["another source", "anew"])
def test_what_a_waiting_reader_has_of_a_lost_source_is_still_said(
    dispatcher: Dispatcher, again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have pulled blocks of it before the first token. Placed anew, nothing of it is left."""
    one = with_worker(dispatcher, (FULL,), 1000)
    dispatcher.cluster.forget(one.key)
    one = replace(one, unquantized_identity="m", pairing_fingerprint="kv")

    def join(name: str, role: Role, weights: str) -> WorkerKey:
        info = replace(one, key=WorkerKey(name, 1), role=role, weights=weights, layout_fingerprint=f"kv {weights}")
        dispatcher.cluster.registered(info, 0.0, leaving=False)
        dispatcher.cluster.connected(info.key, 0.0)
        return info.key

    source, reader = join("p1", Role.PREFILL, ""), join("d", Role.DECODE, "int4 mlp")
    request, client = Request("r", list(range(3000)), Sampling(8), 0.0, 60.0), cast("Any", Mock())
    dispatcher.dispatch(request, Placement.SPLIT, client, RequestTrace("r", None))
    wire = cast("Wire", dispatcher._sender)
    ((_, serves), (_, pulls)) = wire.starts
    assert (serves.mixed_kv, pulls.mixed_kv) == (False, True)
    mix = dispatcher.breakdown_of(pulls.leg).mix  # type: ignore[union-attr]
    assert mix.mixed == ("none", "int4 mlp")
    if again == "another source":
        join("p2", Role.PREFILL, "")
        dispatcher.on_worker_lost(source, "killed")
        assert [name for name, _ in wire.starts[2:]] == ["p2"]
        assert wire.follows == ["d from p2"]
        assert mix.mixed == ("none", "int4 mlp")
    else:
        dispatcher.on_worker_lost(reader, "killed")
        placed = Route(join("d2", Role.DECODE, ""), source, "test", {})
        monkeypatch.setattr(dispatcher._planner, "place", lambda *_: placed)
        dispatcher._tell_request("r", Life.on_retry)
        assert [name for name, _ in wire.starts[2:]] == ["p1", "d2"]
        assert mix.mixed == ()
