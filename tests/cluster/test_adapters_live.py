"""LoRA adapters over real processes that come and go while answers run: by every door, and under kills."""

from __future__ import annotations

import json
import random
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from diptych.v1 import admin_pb2, admin_pb2_grpc, generate_pb2
from typer.testing import CliRunner

from deploy.cli import app
from tests.support.adapters import merged_model, saved_adapter
from tests.support.checkpoints import saved_model, saved_tokenizer
from tests.support.processes import Cluster, Reply
from tests.support.prompts import reference_greedy

SPLIT, LOCAL, AUTO = generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL, generate_pb2.PLACEMENT_AUTO
TOKENS = 8
PROMPTS = tuple([3 + (i * i * 7 + i * 31 + seed * 101) % 280 for i in range(9 + 11 * seed)] for seed in range(3))

pytestmark = pytest.mark.timeout(500)


class Adapters:
    """Directories of a model's adapters, by number, and what each answers."""

    def __init__(self, model: Path, home: Path, count: int) -> None:
        self.model, self.home = model, home
        self.answers: dict[int, list[list[int]]] = {-1: [reference_greedy(str(model), p, TOKENS) for p in PROMPTS]}
        for i in range(count):
            saved_adapter(model, self.path(i), 70 + i, rank=1 + i, size=0.3)
            merged = home / f"merged-{i}"
            merged_model(model, self.path(i)).save_pretrained(merged)
            self.answers[i] = [reference_greedy(str(merged), prompt, TOKENS) for prompt in PROMPTS]
            shutil.rmtree(merged)

    def path(self, number: int) -> Path:
        return self.home / f"a{number}"


class Live:
    def __init__(self, cluster: Cluster, adapters: Adapters) -> None:
        self.cluster, self.adapters = cluster, adapters
        self.admin = admin_pb2_grpc.AdminServiceStub(cluster.channel)

    def load(self, name: str, number: int) -> admin_pb2.LoadAdapterResponse:
        request = admin_pb2.LoadAdapterRequest(name=name, directory=str(self.adapters.path(number)))
        return self.admin.LoadAdapter(request, timeout=120.0)

    def unload(self, name: str) -> None:
        self.admin.UnloadAdapter(admin_pb2.UnloadAdapterRequest(name=name), timeout=120.0)

    def served(self) -> dict[str, tuple[bool, bool]]:
        listed = self.admin.ListAdapters(admin_pb2.ListAdaptersRequest(), timeout=30.0).adapters
        return {one.name: (one.served, one.split) for one in listed}

    def on_all(self, names: Sequence[str], workers: int) -> bool:
        listed = self.admin.ListAdapters(admin_pb2.ListAdaptersRequest(), timeout=30.0).adapters
        return {one.name for one in listed} == set(names) and all(
            sum(w.has for w in one.workers) == workers for one in listed
        )

    def request(self, prompt: int, placement: Any, name: str) -> Any:
        sampling = generate_pb2.SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        return self.cluster.request(PROMPTS[prompt], sampling, placement, model=name)

    def ask(self, prompt: int, placement: Any, name: str) -> list[int]:
        return self.cluster.ask(self.request(prompt, placement, name), timeout_s=120.0).token_ids

    def check(self, prompt: int, placement: Any, name: str, number: int) -> None:
        assert self.ask(prompt, placement, name) == self.adapters.answers[number][prompt]

    def http(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.cluster.http_port}/v1/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def live_cluster(tmp: Path, count: int, **more: Any) -> Live:
    model = saved_model(tmp / "model", "Llama", num_key_value_heads=2)
    saved_tokenizer(model)
    adapters = Adapters(model, tmp, count)
    (tmp / "cluster").mkdir()
    engine: dict[str, Any] = {"kernels": "torch", "num_blocks": 96, "block_tokens": 8, "max_batch_tokens": 64}
    engine |= {"max_running_sequences": 16, "adapters": {"max_rank": 8, "slots": 2, "most": 16}}
    cluster = Cluster(tmp / "cluster", model, engine=engine, transport={"ucx_net_devices": "lo"}, forked=True, **more)
    try:
        cluster.start(240.0)
    except BaseException:
        cluster.stop()
        raise
    return Live(cluster, adapters)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    made = live_cluster(tmp_path_factory.mktemp("live"), 3)
    yield made
    made.cluster.stop()


def run(live: Live, *words: str) -> Any:
    done = CliRunner().invoke(app, ["adapters", *words, "--target", live.cluster.target, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_loaded_replaced_and_unloaded_by_every_door(live: Live) -> None:
    assert run(live, "list") == {"adapters": []}
    told = run(live, "load", "sql", str(live.adapters.path(0)))
    assert (told["served"], told["split"], told["replaced"]) == (True, True, "")
    assert all(worker["has"] for worker in told["workers"].values())
    for placement in (LOCAL, SPLIT):
        live.check(1, placement, "sql", 0)
        live.check(1, placement, "", -1)
    path = {"lora_name": "poet", "lora_path": str(live.adapters.path(1))}
    assert live.http("load_lora_adapter", path) == (200, "Success: LoRA adapter 'poet' added successfully.")
    status, said = live.http("load_lora_adapter", path)
    assert (status, "set load_inplace to true" in said) == (400, True)
    live.check(2, SPLIT, "poet", 1)
    assert (
        live.http("load_lora_adapter", path | {"lora_path": str(live.adapters.path(2)), "load_inplace": True})[0] == 200
    )
    live.check(2, SPLIT, "poet", 2)
    live.check(2, LOCAL, "poet", 2)
    assert run(live, "unload", "sql")["not_yet"] == {}
    assert live.http("unload_lora_adapter", {"lora_name": "poet"})[0] == 200
    assert live.http("unload_lora_adapter", {"lora_name": "poet"})[0] == 404
    with pytest.raises(grpc.RpcError) as refused:
        live.ask(0, LOCAL, "sql")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
    status, said = live.http("load_lora_adapter", {"lora_name": "x", "lora_path": str(live.adapters.model)})
    assert (status, "no decode worker could load it" in said) == (400, True)
    assert live.http("load_lora_adapter", {"lora_name": "x"})[0] == 400
    assert live.http("load_lora_adapter", path | {"lora_int_id": 7})[0] == 400
    assert live.served() == {}
    live.cluster.assert_nothing_left()


def test_an_answer_ends_on_what_it_began_with(live: Live) -> None:
    """Its name is replaced, then unloaded, while it runs. A worker that was killed gets what is served."""
    live.load("sql", 0)
    running = live.cluster.stream(live.request(1, SPLIT, "sql"), 120.0)
    reply = Reply()
    for response in running:
        reply.take(response)
        if reply.token_ids:
            break
    live.load("sql", 1)
    live.check(1, SPLIT, "sql", 1)
    live.unload("sql")
    live.load("poet", 2)
    for response in running:
        reply.take(response)
    assert reply.token_ids == live.adapters.answers[0][1]
    live.cluster.kill("prefill-0")
    live.cluster.start_worker("prefill", "prefill-0")
    live.cluster.wait_until(lambda: live.on_all(["poet"], 2), 120.0, "the adapter on the worker that came back")
    live.check(1, SPLIT, "poet", 2)
    live.unload("poet")
    live.cluster.assert_nothing_left()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_eight_adapters_over_two_slots_under_kills(tmp_path: Path) -> None:
    """Names are replaced and unloaded all the while, and workers killed: an answer is that of one adapter that its name
    stood for while it was asked, or an error.
    """
    live = live_cluster(tmp_path, 8, prefill=2, decode=2)
    rng = random.Random(7)
    lock = threading.Lock()
    stands: dict[str, set[int]] = {}  # what each may stand for; while a command is not carried out in full: both
    history: list[tuple[str, int]] = []
    wrong: list[Any] = []
    counts = {"right": 0, "refused": 0}
    stop = threading.Event()

    def asking(seed: int) -> None:
        own = random.Random(seed)
        while not stop.is_set():
            name = f"n{own.randrange(4)}" if own.random() < 0.9 else ""
            prompt, placement = own.randrange(len(PROMPTS)), own.choice((SPLIT, LOCAL, AUTO))
            with lock:
                first, may = len(history), set(stands.get(name, ())) if name else {-1}
            try:
                tokens = live.ask(prompt, placement, name)
            except grpc.RpcError:
                with lock:
                    counts["refused"] += 1
                continue
            with lock:
                may |= {number for other, number in history[first:] if other == name}
                counts["right"] += 1
                if not any(tokens == live.adapters.answers[number][prompt] for number in may):
                    wrong.append((name, prompt, placement, may, tokens))

    threads = [threading.Thread(target=asking, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(24):
            name, number = f"n{rng.randrange(4)}", rng.randrange(8)
            try:
                if name in stands and rng.random() < 0.3:
                    live.unload(name)
                    continue
                with lock:
                    history.append((name, number))
                    stands.setdefault(name, set()).add(number)
                live.load(name, number)
                with lock:
                    stands[name] = {number}
            except grpc.RpcError:
                pass  # a worker that it asked was killed
            if turn % 6 == 5:
                victim = rng.choice(("prefill-0", "prefill-1", "decode-0", "decode-1"))
                live.cluster.kill(victim)
                live.cluster.start_worker(victim.partition("-")[0], victim)
                live.cluster.wait_ready(2, 2, 240.0)
    finally:
        stop.set()
        for thread in threads:
            thread.join(150)
        if sys.exc_info()[0] is not None:
            live.cluster.stop()
    try:
        assert not wrong, wrong[:3]
        assert counts["right"] > 50, counts
        live.cluster.wait_until(lambda: live.on_all(list(live.served()), 4), 120.0, "all workers alike")
        live.cluster.assert_nothing_left()
    finally:
        live.cluster.stop()
