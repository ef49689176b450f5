"""Runs in the hub's namespace: a cluster over several hosts, and the link between prefill and decode cut under load.

`python -m tests.support.cut_links --directory D --model M --owner PID`: exit code 0, or a traceback that says what
was wrong; NOT_HEALED when every answer was right but the pair of workers did not become what it was: splitting did not
come back with the link, or blocks stayed in quarantine. Router and workers stay connected all the time; only the two
workers lose each other.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import table
from deploy.processes import Processes
from tests.support.chaos.cases import cases_of
from tests.support.chaos.clients import Ledger, Load, generate, record_answers
from tests.support.chaos.cluster import ChaosCluster
from tests.support.chaos.faults import Driver, Fault, Injected
from tests.support.chaos.verdict import HEADER, judge
from tests.support.netns import Hosts

HOSTS = ("prefill-0", "decode-0")
CUTS = (("both ways", 8.0), ("to decode", 8.0), ("both ways", 2.0), ("to prefill", 8.0), ("both ways", 20.0))
HEALED_WITHIN_S = 40.0  # a connection with unacknowledged bytes waits for its retransmission timer
NOT_HEALED = 4


class SpreadProcesses(Processes):
    """Those with a host of their own run in its namespace, the others here."""

    def __init__(self, directory: Path, environment: Mapping[str, str], hosts: Hosts) -> None:
        super().__init__(directory, environment)
        self._hosts = hosts

    def spawn(self, name: str, module: str, settings: Mapping[str, Any]) -> None:
        if name not in self._hosts.addresses:
            super().spawn(name, module, settings)
            return
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(dict(settings)))
        there = ["ip", "netns", "exec", self._hosts.namespace(name)]
        with (self.directory / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [*there, sys.executable, "-m", module, "--config", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1", **self.environment},
                start_new_session=True,
            )


@dataclass
class SpreadCluster(ChaosCluster):
    hosts: Hosts = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.processes = SpreadProcesses(self.directory, {"OMP_NUM_THREADS": "1"}, self.hosts)

    def target_of(self, router: int) -> str:
        return f"{self.hosts.hub_address}:{self.ports[router][0]}"

    def router_addresses(self) -> list[str]:
        return [f"{self.hosts.hub_address}:{internal}" for _, internal in self.ports]

    def _router_config(self) -> dict[str, Any]:
        config = super()._router_config()
        config["router"] |= {"host": self.hosts.hub_address, "internal_host": self.hosts.hub_address}
        config["security"] = {"insecure_ok": True}
        return config

    def _worker_config(self, role: str, worker_id: str) -> dict[str, Any]:
        config = super()._worker_config(role, worker_id)
        config["worker"]["host"] = self.hosts.addresses[worker_id]
        config["security"] = {"insecure_ok": True}
        return config


class CutDriver(Driver):
    cluster: SpreadCluster

    def cut(self, how: str, seconds: float) -> Injected:
        record = Injected(Fault(f"cut {how}", "prefill-0", seconds), time.monotonic())
        self.injected.append(record)
        hosts = self.cluster.hosts
        match how:
            case "both ways":
                hosts.cut("prefill-0", "decode-0")
            case "to decode":
                hosts.cut_one_way("prefill-0", "decode-0")
            case "to prefill":
                hosts.cut_one_way("decode-0", "prefill-0")
        time.sleep(seconds)
        hosts.heal()
        return record

    def seconds_until_split_works(self) -> float | None:
        """After the link is back: until a split answer needs no recovery again. None: not in time."""
        split = next(c for c in self.cases if c.name == "short split")
        begun = time.monotonic()
        while time.monotonic() < begun + HEALED_WITHIN_S:
            salt = f"{random.getrandbits(64):x}"
            attempt = generate(self.cluster, self.ledger, split, 0, 30.0, salt)
            if attempt.outcome == "complete" and not attempt.finished.recoveries:
                return time.monotonic() - begun
            time.sleep(0.2)
        return None


def run(directory: Path, model: Path, hosts: Hosts, cuts: int) -> int:
    from transformers import AutoTokenizer

    cases = cases_of(AutoTokenizer.from_pretrained(model))
    cluster = SpreadCluster(
        directory,
        model,
        prefill=1,
        decode=1,
        routers=1,
        engine={"num_blocks": 128, "max_batch_tokens": 256},
        transport={"digest": True, "ucx_tls": "tcp"},
        router={"itl_target_ms": 50.0},
        worker={"drain_s": 8.0},
        hosts=hosts,
    )
    healed: dict[str, float | None] = {}
    try:
        cluster.start()
        answers = record_answers(cluster, cases)
        cluster.assert_nothing_left()
        ledger = Ledger()
        load = Load(cluster, ledger, cases, seed=1, generate_clients=2, session_width=1)
        driver = CutDriver(cluster, ledger, load, cases, [])
        load.start()
        try:
            time.sleep(3)
            for how, seconds in CUTS[:cuts]:
                record = driver.cut(how, seconds)
                healed[str(record.fault)] = driver.seconds_until_split_works()
                print(f"{record.fault}: split again {healed[str(record.fault)]} s after the link was", flush=True)
                time.sleep(2)
        finally:
            stuck = load.stop()
        verdict = judge(ledger.all(), driver.injected, answers)
        table(HEADER, verdict.rows)
        for one in driver.injected:
            mine = [a for a in ledger.all() if one.at <= a.started <= one.at + one.fault.seconds and a.arrivals]
            slowest = max((a.arrivals[0] - a.started for a in mine), default=0.0)
            gap = max((b - a for x in mine for a, b in zip(x.arrivals, x.arrivals[1:], strict=False)), default=0.0)
            print(f"{one.fault}: slowest first token {slowest:.2f} s, longest gap {gap:.2f} s", flush=True)
        print(json.dumps({"complete": verdict.complete, "errors": verdict.errors, "healed": healed}), flush=True)
        assert not verdict.problems(), "\n".join(verdict.problems()[:20]) + f"\n{cluster.logs()}"
        assert not stuck, f"clients hang: {stuck}"
        known = ["splitting did not come back"] if None in healed.values() else []
        try:
            cluster.assert_nothing_left(20.0)
        except AssertionError as error:
            what = str(error).splitlines()[0]
            if "'quarantined'" not in what:
                raise
            known.append(what)
    finally:
        cluster.stop(60.0)  # a worker with blocks in quarantine drains for as long as it may
    print("; ".join(known), flush=True)
    return NOT_HEALED if known else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--owner", type=int, required=True, help="process id of who made the namespaces")
    parser.add_argument("--cuts", type=int, default=len(CUTS))
    arguments = parser.parse_args()
    hosts = Hosts.made_by(arguments.owner, HOSTS)
    sys.exit(run(arguments.directory, arguments.model, hosts, arguments.cuts))


if __name__ == "__main__":
    main()
