"""The chart's Deployments on this machine: the mounted configuration, the commands, probes and ports of the committed
manifests, and pods that are deleted with answers under way.
"""

from __future__ import annotations

import itertools
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from diptych.v1 import generate_pb2, generate_pb2_grpc

from tests.support import chart, manifests
from tests.support.pods import Pod, wait_until
from tests.support.processes import Reply
from tests.support.prompts import tokens_of

pytestmark = [pytest.mark.timeout(400), pytest.mark.long]

TOKENS = 600


class Deployed:
    """The manifests of values/kind.yaml, with a second decode worker."""

    def __init__(self, home: Path, small_model: Path) -> None:
        things = manifests.load((chart.RENDERED / "kind.yaml").read_text())
        self.templates = {t["metadata"]["name"]: t["spec"]["template"] for t in things if t["kind"] == "Deployment"}
        (mounted,) = [t["data"]["cluster.yaml"] for t in things if "cluster.yaml" in t.get("data", {})]
        self.mounted: dict[str, Any] = yaml.safe_load(mounted)
        self._home, self._model = home, small_model
        self._numbers = itertools.count()
        self.pods: list[Pod] = []
        self.router = self.start("diptych-router")
        self.prefill = self.start("diptych-prefill")
        self.decode = [self.start("diptych-decode"), self.start("diptych-decode")]

    def start(self, deployment: str) -> Pod:
        number = next(self._numbers)
        pod = Pod(number, f"{deployment}-{number}", self.templates[deployment], self._home)
        # All addresses of a pod's network are the pod's own; here they would be everybody's.
        config = yaml.safe_load(yaml.safe_dump(self.mounted).replace("0.0.0.0", pod.ip))
        config["model"] = str(self._model)
        config["engine"] = {"dtype": "float32", "threads": 1, "num_blocks": 300, "kernels": "torch"}
        config["transport"] = {"ucx_net_devices": "lo"}
        (pod.mounts["/etc/diptych/cluster"] / "cluster.yaml").write_text(yaml.safe_dump(config))
        router = pod if deployment == "diptych-router" else self.router
        words = [*pod.container["command"], *pod.container["args"]]
        pod.start([word.replace("diptych-routers:", f"{router.ip}:") for word in words])
        self.pods.append(pod)
        return pod

    def close(self) -> None:
        for pod in self.pods:
            pod.kill()


@pytest.fixture
def deployed(tmp_path: Path, small_model: Path) -> Iterator[Deployed]:
    made = Deployed(tmp_path, small_model)
    try:
        yield made
    finally:
        made.close()


class Answers:
    def __init__(self, target: str, tokenizer: Any) -> None:
        self._stub = generate_pb2_grpc.GenerateServiceStub(grpc.insecure_channel(target))
        self._prompts = [tokens_of(tokenizer, 40 + 30 * n, seed=n) for n in range(4)]
        self.replies: list[Reply] = []
        self.lost: list[str] = []
        self.begin()
        self.join()
        self.expected = [reply.token_ids for reply in self.replies]
        assert [len(ids) for ids in self.expected] == [TOKENS] * 4
        assert self.lost == []

    def begin(self) -> None:
        self.replies = [Reply() for _ in self._prompts]
        self._threads = [threading.Thread(target=self.ask, args=(n, self.replies[n]), daemon=True) for n in range(4)]
        for thread in self._threads:
            thread.start()

    def ask(self, n: int, reply: Reply) -> None:
        sampling = generate_pb2.SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        request = generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=self._prompts[n]), sampling=sampling)
        try:
            for response in self._stub.Generate(request, timeout=200):
                reply.take(response)
        except grpc.RpcError as error:
            self.lost.append(str(error))

    def join(self) -> None:
        for thread in self._threads:
            thread.join(200)

    def under_way(self) -> bool:
        return all(len(reply.token_ids) > 10 for reply in self.replies)

    def assert_exact(self) -> None:
        self.join()
        assert self.lost == []
        assert [reply.token_ids for reply in self.replies] == self.expected


def test_probes_ports_and_pods_that_are_deleted(deployed: Deployed, tokenizer: Any) -> None:
    pods = deployed.pods
    assert not deployed.router.probe("readinessProbe"), "nobody would be served yet"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        wait_until(lambda p=probe: all(pod.probe(p) for pod in pods), 300, f"{probe} of all pods", pods)
    for pod in pods:
        with urllib.request.urlopen(f"http://{pod.ip}:{pod.port('metrics')}/metrics", timeout=30) as answer:
            assert b"diptych_" in answer.read()
    router = deployed.router
    with urllib.request.urlopen(f"http://{router.ip}:{router.port('http')}/metrics", timeout=30) as answer:
        shown = answer.read().decode()
    for name in ("diptych_requests_waiting", "diptych_requests_live", "diptych_kv_used"):
        assert f"\n{name}" in shown, "what a gateway's picker looks at"

    answers = Answers(f"{router.ip}:{router.port('grpc')}", tokenizer)
    answers.begin()
    wait_until(answers.under_way, 60, "tokens of all answers", pods)
    leaving = max(deployed.decode, key=lambda pod: sum(pod.ip in str(r.started) for r in answers.replies))
    code, took_s = leaving.delete()
    pods.remove(leaving)
    assert code == 0, leaving.said()
    assert took_s < leaving.grace_s
    answers.assert_exact()

    # The router: what it has goes on, and while it holds it takes more.
    answers.begin()
    wait_until(answers.under_way, 60, "tokens of all answers", pods)
    ended: list[tuple[int, float]] = []
    deleting = threading.Thread(target=lambda: ended.append(router.delete()))
    deleting.start()
    one_more = Reply()
    answers.ask(0, one_more)
    deleting.join(router.grace_s)
    answers.assert_exact()
    assert one_more.token_ids == answers.expected[0]
    assert ended
    assert ended[0][0] == 0, router.said()
    assert ended[0][1] < router.grace_s
