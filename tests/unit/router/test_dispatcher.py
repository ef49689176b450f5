"""What a client may ask for, as far as the workers' pools set a limit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from checkpoint.generation import SamplingDefaults
from kv_transfer.layout import FULL, Group, KvLayout, Rule
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.placement.adapter_words import said_at_start
from router.placement.cluster import Role, WorkerInfo
from router.placement.policy import Rejection, RequestFacts, Route, WorkerKey

BLOCK, LIMIT = 16, 4096


def group(rule: Rule) -> Group:
    return Group(rule, (0,), 1, 8, "float32")


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    tokenizer: Any = SimpleNamespace(
        name="tiny", sampling_defaults=SamplingDefaults(), chat_template_text="", special_ids=lambda _: {},
        build_llguidance=None, eos_token_ids=frozenset(), vocab_size=100, context_limit_tokens=LIMIT,
        longest_token_chars=4,
    )  # fmt: skip
    made = Dispatcher(RouterConfig(), tokenizer, cast("Any", None), random.Random(1), lambda: 0.0, cast("Any", None))
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
