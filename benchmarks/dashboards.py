"""A real Prometheus beside a real cluster under load: does every query of dashboards and alerts answer, and with what?

Needs `prometheus` on the PATH (Debian package prometheus; `dpkg -x` will do). Starts one router, two prefill and two
decode workers, loads them for `--seconds`, kills a prefill worker on the way, asks every query, and draws the
dashboards' panels from the answers with matplotlib (docs/images/dashboard-*.png). Grafana itself is not run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import tempfile
import time
import urllib.error
import urllib.parse
from pathlib import Path
from typing import Any

import grpc
import matplotlib as mpl
import yaml
from diptych.v1 import cluster_pb2, generate_pb2, generate_pb2_grpc

from benchmarks.children import DIRECT, ROOT, Child, wait_until
from benchmarks.report import parse, provenance, save
from benchmarks.router import free_port
from deploy.observability.alerts import ALERTS
from deploy.observability.dashboards import DASHBOARDS, Dashboard
from settings.model_path import embedded_model_path
from tests.support.processes import Cluster

STEP_S = 2


async def load(target: str, until: float) -> None:
    """Six clients: short and long prompts, some shared, some cancelled, some wrong."""
    shared = [random.randrange(5, 40000) for _ in range(96)]
    async with grpc.aio.insecure_channel(target) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)

        async def client(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < until:
                own = [rng.randrange(5, 40000) for _ in range(rng.choice((24, 64, 160)))]
                request = generate_pb2.GenerateRequest(
                    token_ids=generate_pb2.TokenIds(ids=[*(shared if rng.random() < 0.5 else ()), *own]),
                    sampling=generate_pb2.SamplingParams(
                        max_tokens=10**6 if rng.random() < 0.03 else rng.randrange(4, 24), ignore_eos=True
                    ),
                    placement=rng.choice((generate_pb2.PLACEMENT_AUTO, generate_pb2.PLACEMENT_SPLIT)),
                )
                call = stub.Generate(request, timeout=60)
                stop_after = rng.randrange(1, 5) if rng.random() < 0.1 else 10**6
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                    async for _ in call:
                        stop_after -= 1
                        if not stop_after:
                            call.cancel()

        await asyncio.gather(*(client(i) for i in range(6)))


def ask(port: int, path: str, **parameters: str) -> Any:
    url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with DIRECT.open(url, timeout=10) as answer:
        return json.load(answer)["data"]


def is_up(port: int) -> bool:
    try:
        ask(port, "status/buildinfo")
    except (OSError, urllib.error.URLError):
        return False
    return True


def draw(port: int, dashboard: Dashboard, start: float, end: float, what: str, images: Path) -> int:
    """Returns how many of its queries have data."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows = -(-len(dashboard.panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(18, 3.4 * rows), squeeze=False)
    answered = 0
    for panel, axis in zip(dashboard.panels, axes.flat, strict=False):
        for query in panel.queries:
            # A window of the run's length: rates of five minutes say little about a run of two.
            expr = query.expr.replace("[5m]", "[30s]")
            found = ask(port, "query_range", query=expr, start=str(start), end=str(end), step=str(STEP_S))["result"]
            answered += bool(found)
            for series in found[:10]:
                label = query.legend
                for key, value in series["metric"].items():
                    label = label.replace(f"{{{{{key}}}}}", value)
                times = [float(t) - start for t, _ in series["values"]]
                axis.plot(times, [float(v) for _, v in series["values"]], label=label, linewidth=1.2)
        axis.set_title(f"{panel.title} ({panel.unit})", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(fontsize=6, loc="upper left", ncols=2)
    for axis in axes.flat[len(dashboard.panels) :]:
        axis.axis("off")
    figure.suptitle(f"{dashboard.title}\n{what}; x: seconds", fontsize=9)
    figure.tight_layout()
    path = images / f"{dashboard.uid.replace('diptych-', 'dashboard-')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)
    return answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0)
    arguments = parse(parser, seconds=10.0)
    if shutil.which("prometheus") is None:
        raise SystemExit("there is no `prometheus` on the PATH; install it (Debian: apt-get install prometheus)")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "processes").mkdir()
        cluster = Cluster(
            directory / "processes",
            embedded_model_path(),
            prefill=2,
            decode=1,
            engine={"num_blocks": 96, "max_batch_tokens": 128},
            transport={"ucx_net_devices": "lo"},
            telemetry={"gpu_price_per_hour": {"prefill": 2.0, "decode": 2.0}},
        )
        prometheus: Child | None = None
        try:
            cluster.start()
            port = free_port()
            config = yaml.safe_load((ROOT / "deploy/observability/prometheus.yml").read_text())
            config["global"] = {"scrape_interval": "1s", "evaluation_interval": "2s"}
            config["rule_files"] = [str(ROOT / "deploy/observability/alerts.yaml")]
            url = f"http://{cluster.cluster().router.metrics_address}/targets"
            config["scrape_configs"][0]["http_sd_configs"] = [{"url": url, "refresh_interval": "5s"}]
            (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
            options = [
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=error",
            ]
            prometheus = Child("prometheus", ["prometheus", *options], directory)
            wait_until(lambda: is_up(port), 30.0, "an answer of Prometheus", prometheus)
            start = time.time()
            until = time.monotonic() + arguments.seconds

            async def run() -> None:
                loading = asyncio.create_task(load(cluster.target, until))
                await asyncio.sleep(arguments.seconds * 0.6)
                cluster.kill("prefill-1")
                await loading

            asyncio.run(run())
            time.sleep(2.0)
            end = time.time()
            facts = provenance()
            what = f"benchmarks/dashboards.py, {facts['date']}, {facts['machine']}; CPU, 135M parameters; one kill"
            asked = {d.uid: sum(len(p.queries) for p in d.panels) for d in DASHBOARDS}
            images = directory if arguments.smoke else ROOT / "docs/images"
            answered = {d.uid: draw(port, d, start, end, what, images) for d in DASHBOARDS}
            rules = [r for group in ask(port, "rules")["groups"] for r in group["rules"]]
            states = {r["name"]: (r["health"], r["state"]) for r in rules}
            ready = len(cluster.ready(cluster_pb2.ROLE_PREFILL))
        finally:
            if prometheus is not None:
                prometheus.stop()
            cluster.stop()
    save("dashboards", {"asked": asked, "answered": answered, "rules": states, "prefill_ready_at_end": ready})
    assert states.keys() == {alert.name for alert in ALERTS}
    assert all(health == "ok" for health, _ in states.values())


if __name__ == "__main__":
    main()
