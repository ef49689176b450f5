"""How answers and prefixes move between workers of different degree, over real processes: running answers from one to
another and back, answers that are resumed, cached prefixes that are lent, and a source that loses a rank in the middle.
Every answer is that of plain transformers, or with a seed that of one process.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from diptych.v1 import admin_pb2, admin_pb2_grpc, cluster_pb2, generate_pb2

from tests.support.degrees import ENGINE, Degree, DegreesCluster, alone, made_model, prompt_of
from tests.support.processes import Reply
from tests.support.prompts import reference_greedy
from tests.support.ranked_worker import ranks_of

SPLIT, LOCAL, AUTO = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL, generate_pb2.PLACEMENT_AUTO
ROLES = {"decode": cluster_pb2.ROLE_DECODE, "standby": cluster_pb2.ROLE_STANDBY}
TOKENS = 120
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 7, "repetition_penalty": 1.1}
# The prefill worker, and two decode workers.
CLUSTERS: list[tuple[str, tuple[Degree, Degree, Degree]]] = [
    ("heads", ((2, 1), (1, 1), (2, 1))),
    ("heads", ((1, 1), (4, 1), (2, 1))),
    ("experts", ((4, 2), (1, 1), (2, 2))),
    ("windows beside full", ((2, 2), (1, 1), (4, 2))),
    ("latent", ((2, 1), (4, 2), (1, 1))),
]
LENT = ("heads", "experts", "latent")  # whose layers all keep the same

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]


def _named(made: tuple[str, tuple[Degree, Degree, Degree]]) -> str:
    family, degrees = made
    return f"{family.replace(' ', '_')}-{'-'.join(str(ranks) for ranks, _ in degrees)}"


class Moves:
    def __init__(self, cluster: DegreesCluster, family: str) -> None:
        self.cluster, self.family = cluster, family
        self.admin = admin_pb2_grpc.AdminServiceStub(cluster.channel)

    def expected(self, prompt: list[int], tokens: int, **sampling: Any) -> list[int]:
        if sampling:
            return alone(self.cluster.model, prompt, tokens, **sampling)
        return reference_greedy(str(self.cluster.model), prompt, tokens)

    def begin(self, prompt: list[int], tokens: int, name: str, **sampling: Any) -> tuple[Reply, threading.Thread]:
        """`name`: of the request, by which it can be moved."""
        params = generate_pb2.SamplingParams(max_tokens=tokens, **sampling)
        request = self.cluster.request(prompt, params, LOCAL, request_id=name, cache_salt=name)
        reply = Reply()

        def run() -> None:
            for response in self.cluster.stream(request, 120.0):
                reply.take(response)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.cluster.wait_until(lambda: len(reply.token_ids) > 3, 60.0, f"tokens of {name}")
        return reply, thread

    def move(self, name: str, target: str) -> str:
        """What became of it."""
        request = admin_pb2.MigrateRequest(request_id=name, target_worker=target)
        try:
            return self.admin.Migrate(request, timeout=60.0).migration.outcome
        except grpc.RpcError as error:  # a target that stood still for a moment is no target
            return f"{error.code().name}: {error.details()}"  # type: ignore[attr-defined]

    def switch(self, worker: str, role: str) -> None:
        self.admin.SwitchRole(admin_pb2.SwitchRoleRequest(worker_id=worker, role=ROLES[role]), timeout=30.0)

        def there() -> bool:
            return any(w.worker_id == worker and w.role == ROLES[role] for w in self.cluster.cluster().workers)

        self.cluster.wait_until(there, 30.0, f"{worker} as {role}")

    def only(self, worker: str) -> None:
        """Of the decode workers."""
        self.switch(worker, "decode")
        self.switch({"decode-0": "decode-1", "decode-1": "decode-0"}[worker], "standby")

    def pulled(self, worker: str) -> int:
        return next(w.load.prefix_pulls_total for w in self.cluster.cluster().workers if w.worker_id == worker)


@pytest.fixture(scope="module", params=CLUSTERS, ids=_named)
def moves(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moves]:
    """Steps take so long that a running answer can be moved, and a prefix is cheaper to pull than to compute."""
    name, (prefill, *decode) = request.param
    cluster = DegreesCluster(
        tmp_path_factory.mktemp("moves"),
        made_model(tmp_path_factory.mktemp("model"), name),
        decode=2,
        engine=ENGINE,
        transport={"ucx_net_devices": "lo"},
        forked=True,
        pace="40 3",
        worker_module="tests.support.ranked_worker",
        degrees={"prefill-0": prefill, "decode-0": decode[0], "decode-1": decode[1]},
    )
    try:
        yield Moves(cluster.start(120.0), name)
    finally:
        cluster.stop()


def tried(attempt: Callable[[int], bool], times: int = 4) -> bool:
    """Workers that meet for the first time may be too slow for what is to be won, and so is a machine that is busy."""
    return any(attempt(number) for number in range(times))


@pytest.mark.parametrize("sampling", [{}, SEEDED], ids=["greedy", "seeded"])
def test_a_running_answer_goes_to_another_degree_and_back(moves: Moves, sampling: dict[str, Any]) -> None:
    cluster = moves.cluster
    prompt = prompt_of(100, seed=11)
    expected = moves.expected(prompt, TOKENS, **sampling)

    def there_and_back(number: int) -> bool:
        name = f"{'seeded' if sampling else 'greedy'}-{number}"
        reply, thread = moves.begin(prompt, TOKENS, name, ignore_eos=True, **sampling)
        first = reply.started.route.decode_worker
        other = "decode-1" if first == "decode-0" else "decode-0"
        outcomes = [moves.move(name, other), moves.move(name, first)]
        thread.join(120)
        assert reply.finished is not None, cluster.logs()
        assert reply.token_ids[: len(expected)] == expected, outcomes
        assert len(reply.token_ids) == TOKENS
        print(name, outcomes)
        return outcomes == ["done", "done"]

    assert tried(there_and_back), cluster.logs()
    cluster.assert_nothing_left()


@pytest.mark.parametrize("worker", ["decode-0", "decode-1"])
def test_an_answer_is_resumed_on_either(moves: Moves, worker: str) -> None:
    cluster = moves.cluster
    moves.only(worker)
    try:
        for sampling in ({}, SEEDED):
            prompt = prompt_of(70, seed=12)
            expected = moves.expected(prompt, 16, **sampling)
            params = generate_pb2.SamplingParams(max_tokens=16, **sampling)
            for placement in (SPLIT, LOCAL):
                for seam in (1, 7):
                    request = cluster.request(
                        prompt, params, placement, cache_salt=f"{placement}{seam}", emitted_token_ids=expected[:seam]
                    )
                    reply = Reply(token_ids=expected[:seam])
                    for response in cluster.stream(request):
                        reply.take(response)
                    assert reply.token_ids[: len(expected)] == expected, (placement, seam)
                    assert reply.started.route.decode_worker == worker
    finally:
        moves.switch("decode-0", "decode")
        moves.switch("decode-1", "decode")


@pytest.mark.parametrize("reader", ["prefill-0", "decode-0", "decode-1"])
def test_a_cached_prefix_is_lent_to_another_degree(moves: Moves, reader: str) -> None:
    """To a decode worker by the other one, which stands by; to the prefill worker by decode."""
    if moves.family not in LENT:
        pytest.skip("prefixes of several kinds of KV are not lent")
    cluster = moves.cluster
    holder = {"prefill-0": "decode-1", "decode-0": "decode-1", "decode-1": "decode-0"}[reader]
    before = moves.pulled(reader)

    def lent(number: int) -> bool:
        salt = f"lent to {reader}, {number}"
        prompt = prompt_of(180, seed=20 + number)
        moves.only(holder)
        first = cluster.answer(prompt, LOCAL, 8, salt, ignore_eos=True)
        assert first.started.route.decode_worker == holder
        second = [*prompt, *first.token_ids, *prompt_of(20, seed=9)]
        if reader.startswith("decode"):
            moves.only(reader)
        reply = cluster.answer(second, SPLIT if reader.startswith("prefill") else LOCAL, 8, salt)
        expected = reference_greedy(str(cluster.model), second, 8)
        assert reply.token_ids[: len(expected)] == expected
        return reply.finished.usage.cached_tokens >= 160

    try:
        assert tried(lent), cluster.logs()
        cluster.wait_until(lambda: moves.pulled(reader) > before, 10.0, "the pull is reported")
    finally:
        moves.switch("decode-0", "decode")
        moves.switch("decode-1", "decode")
    cluster.assert_nothing_left()


@pytest.mark.parametrize("victim", ["leader", "rank"])
def test_a_source_that_loses_a_rank_in_the_middle_costs_no_answer(moves: Moves, victim: str) -> None:
    """Decode goes on with what came over, computes prompts itself until there is a source again, and then is fed."""
    cluster = moves.cluster
    source = cluster.processes.running["prefill-0"]
    ranks = ranks_of(source.pid)
    if victim == "rank" and not ranks:
        pytest.skip("it is one process")
    prompt = prompt_of(220, seed=13)
    expected = reference_greedy(str(cluster.model), prompt, 16)
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(cluster.answer(prompt, SPLIT, 16, victim)), daemon=True)
    thread.start()

    def leased() -> bool:
        return any(w.load.leased_blocks for w in cluster.ready(cluster_pb2.ROLE_PREFILL))

    cluster.wait_until(leased, 20.0, "a chunk is computed")
    cluster.processes.running.pop("prefill-0")
    (source if victim == "leader" else ranks[-1]).send_signal(signal.SIGKILL)
    assert source.wait(60) == (-signal.SIGKILL if victim == "leader" else 2), cluster.logs()
    for rank in ranks:
        rank.wait(10)
    thread.join(60)
    (reply,) = replies
    assert reply.token_ids[: len(expected)] == expected
    assert reply.finished.recoveries == 1
    cluster.wait_until(lambda: not cluster.ready(cluster_pb2.ROLE_PREFILL), 20.0, "its end is noticed")
    assert cluster.answer(prompt, AUTO, 16, "meanwhile").token_ids[: len(expected)] == expected
    cluster.start_worker("prefill", "prefill-0")
    cluster.wait_ready(1, 2, 90.0)
    for reply in cluster.undisturbed(prompt, SPLIT, 16):
        assert reply.token_ids[: len(expected)] == expected
        assert reply.split
    cluster.assert_nothing_left()
