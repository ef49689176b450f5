"""Workers that change their role, are drained, and give answers away, while requests run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.v1 import admin_pb2, admin_pb2_grpc, cluster_pb2, generate_pb2
from typer.testing import CliRunner

from deploy.cli import app
from tests.cluster.conftest import PACE
from tests.support.processes import Cluster, Reply
from tests.support.prompts import reference_greedy, tokens_of

SPLIT, LOCAL = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL
PREFILL, DECODE, STANDBY = cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_DECODE, cluster_pb2.ROLE_STANDBY
LONG = generate_pb2.SamplingParams(max_tokens=200, ignore_eos=True)


@contextmanager
def running(directory: Path, model: Path, **options: Any) -> Iterator[Cluster]:
    """One prefill and two decode workers."""
    engine = {"num_blocks": 256, "max_batch_tokens": 128}
    cluster = Cluster(directory, model, decode=2, engine=engine, transport={"ucx_net_devices": "lo"}, **options)
    try:
        yield cluster.start(timeout_s=180.0)
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    """Each test gives the workers back as they were."""
    with running(tmp_path_factory.mktemp("elastic"), small_model, forked=True, pace=PACE) as cluster:
        yield cluster


class Load:
    """Long answers at once, each in a thread; all are held to the undisturbed ones."""

    def __init__(self, cluster: Cluster, prompts: list[list[int]]) -> None:
        self.cluster = cluster
        self.requests = [cluster.request(p, LONG, LOCAL, cache_salt=f"{i}") for i, p in enumerate(prompts)]
        self.undisturbed = [cluster.ask(request).token_ids for request in self.requests]
        self.replies: list[Reply] = []
        self.failed: list[grpc.RpcError] = []
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Returns when all have some tokens."""
        self.replies = [Reply() for _ in self.requests]
        self.threads = [
            threading.Thread(target=self._run, args=one, daemon=True)
            for one in zip(self.requests, self.replies, strict=True)
        ]
        for thread in self.threads:
            thread.start()
        self.cluster.wait_until(lambda: all(len(r.token_ids) > 3 for r in self.replies), 60, "tokens of every answer")

    def _run(self, request: Any, reply: Reply) -> None:
        try:
            for response in self.cluster.stream(request, 300):
                reply.take(response)
        except grpc.RpcError as error:
            self.failed.append(error)

    def on(self, worker_id: str) -> int:
        return sum(reply.started.route.decode_worker == worker_id for reply in self.replies)

    def assert_undisturbed(self) -> None:
        for thread in self.threads:
            thread.join(300)
        assert not self.failed
        assert [r.token_ids for r in self.replies] == self.undisturbed
        assert [r.finished.recoveries for r in self.replies] == [0] * len(self.replies)


def role_of(cluster: Cluster, worker_id: str) -> int:
    return next(w.role for w in cluster.cluster().workers if w.worker_id == worker_id)


def told(cluster: Cluster, *words: str) -> Any:
    result = CliRunner().invoke(app, [*words, "--target", cluster.target, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def switch(cluster: Cluster, worker_id: str, role: str) -> Any:
    return told(cluster, "switch", worker_id, "--to", role)


def refusal(call: Callable[..., Any], request: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as error:
        call(request, timeout=20)
    return error.value.code().name, error.value.details()  # type: ignore[attr-defined]


@pytest.mark.timeout(240)
def test_a_drained_worker_is_empty_within_seconds_and_nothing_is_lost(elastic: Cluster, tokenizer: Any) -> None:
    load = Load(elastic, [tokens_of(tokenizer, 60, seed) for seed in range(3)])
    load.start()
    busiest = max(("decode-0", "decode-1"), key=load.on)
    other = "decode-1" if busiest == "decode-0" else "decode-0"
    expected = load.on(busiest)
    drained = told(elastic, "drain", busiest)
    assert any(thread.is_alive() for thread in load.threads), "it did not wait for the answers to end"
    assert drained["left"] == 0
    assert drained["migrated"] >= 1
    assert drained["migrated"] + drained["ended"] == expected, "what was nearly over ended there"
    assert role_of(elastic, busiest) == STANDBY
    load.assert_undisturbed()
    moved = [r.finished.route for r in load.replies if r.finished.route.decode_worker != r.started.route.decode_worker]
    assert [(route.decode_worker, route.rule) for route in moved] == [
        (other, "migrated: its worker takes another part")
    ] * drained["migrated"]
    shown = elastic.cluster().migrations
    assert len([m for m in shown if m.outcome == "done" and m.source_worker == busiest]) == len(moved)
    scaled = told(elastic, "scale", "decode=2")
    assert scaled["switches"] == [{"worker": busiest, "before": "standby", "role": "decode"}]
    assert scaled["ready"] == {"prefill": 1, "decode": 2, "standby": 0}
    elastic.assert_nothing_left()


@pytest.mark.timeout(240)
def test_a_switched_worker_serves_its_new_role_at_once_and_keeps_its_cache(elastic: Cluster, tokenizer: Any) -> None:
    prompt = tokens_of(tokenizer, 300, seed=77)
    few = generate_pb2.SamplingParams(max_tokens=6)
    expected = reference_greedy(str(elastic.model), prompt, 6)
    switch(elastic, "decode-1", "standby")  # nobody else has or gets the prompt
    first = elastic.ask(elastic.request(prompt, few, LOCAL))
    again = elastic.ask(elastic.request(prompt, few, LOCAL))
    before = again.finished.usage.cached_tokens
    assert before > 200
    switch(elastic, "decode-1", "decode")
    began = time.monotonic()
    assert switch(elastic, "decode-0", "prefill")["before"] == "decode"
    switch(elastic, "prefill-0", "standby")
    split = elastic.ask(elastic.request(prompt, few, SPLIT))
    assert split.arrival_s[0] - began < 5.0, "on a loaded machine; alone it is some 0.1 s"
    assert split.started.route.prefill_worker == "decode-0"
    assert split.finished.usage.cached_tokens == before
    switch(elastic, "prefill-0", "prefill")
    switch(elastic, "decode-0", "decode")
    switch(elastic, "decode-1", "standby")
    back = elastic.ask(elastic.request(prompt, few, LOCAL))
    assert back.finished.usage.cached_tokens == before
    switch(elastic, "decode-1", "decode")
    assert [r.token_ids for r in (first, again, split, back)] == [expected] * 4
    elastic.assert_nothing_left()


@pytest.mark.timeout(240)
def test_an_answer_moves_by_hand_and_says_so(elastic: Cluster, tokenizer: Any) -> None:
    load = Load(elastic, [tokens_of(tokenizer, 50, seed=5)])
    load.start()
    started = load.replies[0].started
    other = {"decode-0": "decode-1", "decode-1": "decode-0"}[started.route.decode_worker]
    moved = told(elastic, "migrate", started.request_id, "--to", other)
    assert (moved["target"], moved["outcome"]) == (other, "done")
    assert moved["pause_ms"] > 0
    explained = told(elastic, "explain", started.request_id)
    assert [(m["target"], m["reason"]) for m in explained["migrations"]] == [(other, "asked for")]
    load.assert_undisturbed()
    elastic.assert_nothing_left()


def test_refusals_name_cause_and_fix(elastic: Cluster) -> None:
    admin = admin_pb2_grpc.AdminServiceStub(elastic.channel)
    code, why = refusal(admin.SwitchRole, admin_pb2.SwitchRoleRequest(worker_id="nobody", role=DECODE))
    assert code == "NOT_FOUND"
    assert all(name in why for name in ("nobody", "prefill-0", "decode-0", "decode-1"))
    code, why = refusal(admin.SwitchRole, admin_pb2.SwitchRoleRequest(worker_id="prefill-0", role=DECODE))
    assert code == "FAILED_PRECONDITION"
    assert "last prefill worker" in why
    assert "--force" in why
    assert refusal(admin.SwitchRole, admin_pb2.SwitchRoleRequest(worker_id="decode-0"))[0] == "INVALID_ARGUMENT"
    code, why = refusal(admin.Migrate, admin_pb2.MigrateRequest(request_id="nope", target_worker="decode-0"))
    assert (code, "no request 'nope'" in why) == ("NOT_FOUND", True)
    code, why = refusal(admin.Scale, admin_pb2.ScaleRequest(prefill=3, decode=5))
    assert (code, "start 5 more" in why) == ("FAILED_PRECONDITION", True)
    assert refusal(admin.Scale, admin_pb2.ScaleRequest())[0] == "INVALID_ARGUMENT"
    assert [role_of(elastic, w) for w in ("prefill-0", "decode-0", "decode-1")] == [PREFILL, DECODE, DECODE]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_roles_swing_under_load_and_every_answer_is_the_undisturbed_one(
    tmp_path: Path, model_path: Path, tokenizer: Any
) -> None:
    with running(tmp_path, model_path) as cluster:
        swing(cluster, tokenizer)


def swing(elastic: Cluster, tokenizer: Any) -> None:
    load = Load(elastic, [tokens_of(tokenizer, 60, 100 + seed) for seed in range(4)])
    few = generate_pb2.SamplingParams(max_tokens=4)
    slowest = 0.0
    for number in range(6):
        load.start()
        worker = f"decode-{number % 2}"
        for role in ("prefill", "decode", "standby", "decode"):
            began = time.monotonic()
            switch(elastic, worker, role)
            slowest = max(slowest, time.monotonic() - began)
            if role != "standby":
                placement = SPLIT if role == "prefill" else LOCAL
                elastic.ask(elastic.request(tokens_of(tokenizer, 80, 1000 + number), few, placement))
        load.assert_undisturbed()
    assert slowest < 5.0
    assert elastic.cluster().router.errors_total == 0
    elastic.assert_nothing_left()
