"""The `diptych` command."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.access import AccessError
from deploy.adapters_cli import app as adapters_app
from deploy.check import check
from deploy.clients import (
    FINISH_NAMES,
    Answer,
    RequestFailed,
    build_request,
    channel_to,
    generate_anywhere,
    get_cluster,
    get_explanation,
    watch_cluster,
)
from deploy.config import ClusterConfig
from deploy.console import VERSION, err, fail, out, say_error
from deploy.convert import convert
from deploy.operate import add_operator_commands
from deploy.progress import Stages
from deploy.run_one import run_one
from deploy.scaling_cli import SCALING, explain_scaling, scaling
from deploy.security_cli import add_commands
from deploy.simulate import plan, simulate
from settings.addresses import host_of, join
from settings.file import SettingsError, read_settings, validate_settings
from settings.model_path import EMBEDDED_MODEL

app = typer.Typer(
    help="Diptych: disaggregated prefill/decode serving.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _of_all(version: Annotated[bool, VERSION] = False) -> None:
    """Diptych: disaggregated prefill/decode serving."""


Target = Annotated[str, typer.Option(help="host:port of a router, or of several of one cluster: a:8100,b:8100")]
DEFAULT_TARGET = "localhost:8100"


def fail_request(error: RequestFailed, target: str) -> NoReturn:
    if error.code == "UNAVAILABLE" and "connect" in str(error).lower():
        fail(f"no router answers at {target}; start one with `diptych up`, or name another with --target")
    fail(f"{error.code}: {error}")


# Cluster.


def load_config(path: Path | None, overrides: dict[str, Any]) -> ClusterConfig:
    """The file, then what the command line says. Raises SettingsError."""
    base = read_settings(path, ClusterConfig) if path is not None else ClusterConfig()
    data = base.model_dump()
    for dotted, value in overrides.items():
        if value is not None:
            *sections, key = dotted.split(".")
            place = data
            for section in sections:
                place = place[section]
            place[key] = value
    return validate_settings(data, ClusterConfig, "command line")


class _Leaving:
    """SIGINT, SIGTERM and SIGHUP (the terminal was closed). While a cluster starts, the first of them breaks that off,
    whatever waits for what; later ones wait for the end.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.number = 0  # of the signal that broke off the start
        self._starting = True

    def listen(self) -> None:
        """Again after anything that puts handlers of its own in place, as Ray does."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._hear)

    def ready(self) -> None:
        self._starting = False
        self.listen()

    def _hear(self, number: int, _: object) -> None:
        self.asked.set()
        if self._starting:
            self._starting, self.number = False, number
            raise KeyboardInterrupt


@app.command()
def up(
    config: Annotated[Path | None, typer.Option(help="cluster.yaml; every key has a default")] = None,
    model: Annotated[str | None, typer.Option(help='A directory, a hub id, or "embedded"')] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers", min=0)] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers", min=0)] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Public gRPC port", min=1, max=65535)] = None,
    http_port: Annotated[int | None, typer.Option(help="Public HTTP port (OpenAI API)", min=1, max=65535)] = None,
    internal_port: Annotated[int | None, typer.Option(help="Port where workers register", min=1, max=65535)] = None,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Run under Ray Serve, or as plain processes")] = True,
    ray_address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until the cluster is ready", min=1)] = 300.0,
) -> None:
    """Start a cluster and run it until Ctrl-C. Prints a line when the router is ready."""
    from deploy.cluster_up import running_cluster
    from deploy.ray_cluster import ClusterStartError

    leaving = _Leaving()
    leaving.listen()
    stages = Stages(err, each=leaving.listen, at_end=leaving.ready)
    if ray_address is not None and not ray:
        fail("--ray-address joins a Ray cluster and --no-ray uses none; leave one of them out")
    try:
        cluster_config = load_config(
            config,
            {
                "model": model,
                "prefill.replicas": prefill,
                "decode.replicas": decode,
                "router.grpc_port": grpc_port,
                "router.http_port": http_port,
                "router.internal_port": internal_port,
                "ray.address": ray_address,
            },
        )
        if cluster_config.model == EMBEDDED_MODEL:
            fetch_embedded_model()
        with running_cluster(cluster_config, use_ray=ray, say=stages, timeout_s=timeout) as (target, problems):
            stages.done()
            leaving.ready()
            out.print(
                f"ready: {target} serves {cluster_config.served_name} "
                f"with {cluster_config.prefill.replicas} prefill and {cluster_config.decode.replicas} decode workers; "
                "Ctrl-C stops it",
                soft_wrap=True,
            )
            if cluster_config.router.http_port is not None:
                scheme = "http" if cluster_config.security.public_tls is None else "https"
                first = host_of(target.partition(",")[0])
                out.print(
                    f"OpenAI API: {scheme}://{join(first, cluster_config.router.http_port)}/v1",
                    soft_wrap=True,
                )
            while not leaving.asked.wait(0.5):
                for problem in problems():
                    err.print(problem, style="red", soft_wrap=True)
    except (SettingsError, ClusterStartError) as error:
        stages.done()
        fail(str(error))
    except (KeyboardInterrupt, SystemExit):  # the second: Ray's own handler of SIGTERM, while Ray starts
        stages.done()
        err.print("stopped before it was ready; nothing is left running", soft_wrap=True)
        raise typer.Exit(128 + (leaving.number or signal.SIGTERM)) from None
    finally:
        stages.done()


app.command(name="run")(run_one)


# Requests.


@app.command(name="generate")
def generate_command(
    prompt: Annotated[str, typer.Argument(help='The prompt; "-" reads standard input')],
    target: Target = DEFAULT_TARGET,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Use the chat template, or send the prompt unchanged")
    ] = True,
    max_tokens: Annotated[int | None, typer.Option(min=0, max=(1 << 32) - 1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=(1 << 64) - 1)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; repeatable")] = None,
    json_schema: Annotated[Path | None, typer.Option(help="File with a JSON Schema for the answer")] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the whole answer must match")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="The answer is one of these; repeatable")] = None,
    logit_bias: Annotated[
        list[str] | None, typer.Option(help="ID=V: add V to the logit of token ID; repeatable")
    ] = None,
    placement: Annotated[str, typer.Option(help="auto, local or split")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds for the whole answer", min=0.001)] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of text")] = False,
) -> None:
    """Send one prompt and stream the answer."""
    if placement not in ("auto", "local", "split"):
        fail(f"--placement is {placement!r}; use auto, local or split")
    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    if (json_schema is not None) + (regex is not None) + bool(choice) > 1:
        fail("--json-schema, --regex and --choice exclude each other; use only one")
    try:
        schema = json_schema.read_text() if json_schema is not None else None
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--json-schema {json_schema}: {error}; name a file with a JSON Schema")
    try:
        request = build_request(
            text,
            chat=chat,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            placement=placement,
            stop=tuple(stop or ()),
            logit_bias=parse_biases(logit_bias or []),
            json_schema=schema,
            regex=regex,
            choice=choice or (),
        )
    except ValueError as error:
        fail(f"a value is out of range: {error}")
    answer = Answer()
    try:
        for piece in generate_anywhere(target, request, timeout, answer):
            if not as_json:
                out.print(piece, end="", soft_wrap=True)
    except RequestFailed as error:
        if answer.text and not as_json:
            out.print()
        fail_request(error, target)
    if as_json:
        out.print_json(json.dumps(describe(answer)))
    else:
        out.print()
        err.print(summary_line(answer), style="dim", soft_wrap=True)


def parse_biases(texts: list[str]) -> dict[int, float]:
    biases = {}
    for text in texts:
        token, _, value = text.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            fail(f"--logit-bias {text!r} is not ID=V; for example 198=-100")
    return biases


def describe(answer: Answer) -> dict[str, Any]:
    finished = answer.finished
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": FINISH_NAMES.get(finished.reason, "?"),
        "usage": {
            "prompt_tokens": finished.usage.prompt_tokens,
            "cached_tokens": finished.usage.cached_tokens,
            "completion_tokens": finished.usage.completion_tokens,
        },
        "route": {
            "placement": "split" if answer.split else "local",
            "prefill_worker": finished.route.prefill_worker,
            "decode_worker": finished.route.decode_worker,
            "rule": finished.route.rule,
            "estimates": {e.name: e.value for e in finished.route.estimates},
        },
        "timings": {
            name: getattr(finished.timings, name)
            for name in ("queue_ms", "ttft_ms", "handoff_gap_ms", "decode_ms", "total_ms", "kv_early_share", "adopt_ms")
        },
        "recoveries": finished.recoveries,
    }


def summary_line(answer: Answer) -> str:
    """Route with its reason, and where the time went."""
    finished = answer.finished
    route, timings, usage = finished.route, finished.timings, finished.usage
    if answer.split:
        where = f"split: {route.prefill_worker} → {route.decode_worker}"
        gap = f" · handoff gap {timings.handoff_gap_ms:.0f} ms (KV early {timings.kv_early_share:.0%})"
    else:
        where, gap = f"local: {route.decode_worker}", ""
    recovered = f" · recovered {finished.recoveries}×" if finished.recoveries else ""
    return (
        f"{where} ({route.rule}) · prompt {usage.prompt_tokens} tokens, {usage.cached_tokens} cached · "
        f"TTFT {timings.ttft_ms:.0f} ms{gap} · {usage.completion_tokens} tokens at {answer.tokens_per_s:.1f}/s · "
        f"{FINISH_NAMES.get(finished.reason, '?')}{recovered}"
    )


@app.command()
def status(
    target: Target = DEFAULT_TARGET,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between refreshes", min=0.1, max=60)] = 1.0,
    listeners: Annotated[bool, typer.Option("--listeners", help="Show every open port, and who may use it")] = False,
) -> None:
    """Show pools, workers, load, KV use and recent routes."""
    from deploy.status_view import render, render_listeners

    try:
        with channel_to(target) as channel:
            if listeners:
                out.print(render_listeners(get_cluster(channel, 5.0)))
                return
            if not watch:
                out.print(render(get_cluster(channel, 5.0), width=out.width))
                return
            with Live(console=out, auto_refresh=False, screen=out.is_terminal) as live:
                for cluster in watch_cluster(channel, int(interval * 1000)):
                    live.update(render(cluster, width=out.width), refresh=True)
    except RequestFailed as error:
        fail_request(error, target)
    except KeyboardInterrupt:
        return


@app.command()
def explain(
    request_id: Annotated[
        str, typer.Argument(help='Id as in `diptych status`; default: the newest request; or "scaling"')
    ] = "",
    target: Target = DEFAULT_TARGET,
    last: Annotated[
        int, typer.Option(help="Of scaling: how many decisions before the current one", min=0, max=384)
    ] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text")] = False,
) -> None:
    """Explain why a request ran where it did: estimates, alternatives, and the outcome.

    `diptych explain scaling`: how many workers the pools should have, when and why that was decided, and what was
    weighed.
    """
    from deploy.explain_view import render, to_dict

    try:
        with channel_to(target) as channel:
            if request_id == SCALING:
                explain_scaling(channel, last, as_json=as_json)
                return
            explanation = get_explanation(channel, request_id, 5.0)
    except RequestFailed as error:
        fail_request(error, target)
    if as_json:
        out.print_json(json.dumps(to_dict(explanation)))
    else:
        out.print(render(explanation), soft_wrap=True)


@app.command()
def bench(
    target: Target = DEFAULT_TARGET,
    requests: Annotated[int, typer.Option(min=1)] = 32,
    concurrency: Annotated[
        int | None, typer.Option(help="Most requests at once; unset = 4, or 256 for a trace", min=1)
    ] = None,
    short_tokens: Annotated[int, typer.Option(min=1)] = 64,
    long_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    long_share: Annotated[float, typer.Option(min=0, max=1)] = 0.5,
    max_tokens: Annotated[int, typer.Option(min=1)] = 32,
    ttft_target_ms: Annotated[float, typer.Option()] = 5000.0,
    itl_target_ms: Annotated[float, typer.Option()] = 200.0,
    placement: Annotated[str, typer.Option(help="auto, local or split")] = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    trace: Annotated[
        Path | None, typer.Option(help="Replay this trace (Mooncake, Azure, ServeGen, or plain lengths)")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests/s of the trace; unset = as recorded", min=0.001)] = None,
    shorten: Annotated[float, typer.Option(help="Divide the trace's lengths by this", min=1)] = 1.0,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Write result.json and latencies.png here")] = None,
) -> None:
    """Put load on a live cluster and measure TTFT, inter-token latency, handoff gap and goodput."""
    from deploy.bench import BenchPlan, replay, run, synthetic, write_report
    from simulator.run import load_trace
    from simulator.traces import TraceError, at_rate, shortened

    if placement not in ("auto", "local", "split"):
        fail(f"--placement is {placement!r}; use auto, local or split")
    if trace is None and (rate is not None or shorten != 1.0):
        fail("--rate and --shorten need a --trace; give one, or set --concurrency, --short-tokens and --long-tokens")
    if out_dir is not None:
        try:  # now, not after the whole load
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--out {out_dir}: {error.strerror}; name a folder that can be written")
    plan = BenchPlan(
        requests,
        concurrency or (4 if trace is None else 256),  # a trace comes when it comes
        short_tokens,
        long_tokens,
        long_share,
        max_tokens,
        ttft_target_ms,
        itl_target_ms,
        placement,
        seed,
        ""
        if trace is None
        else f"{trace.name}, lengths / {shorten:g}, {f'{rate:g}/s' if rate else 'rate as recorded'}",
    )
    if trace is None:
        jobs = synthetic(plan)
    else:
        try:
            played = shortened(load_trace(trace, seed, requests), shorten)
        except TraceError as error:
            fail(str(error))
        jobs = replay(at_rate(played, rate) if rate else played)
    done_of_all = TextColumn("{task.completed}/{task.total}")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), done_of_all, TimeElapsedColumn())
    try:
        with Progress(*columns, console=err) as progress:
            task = progress.add_task("requests", total=len(jobs))
            result = run(target, plan, jobs, lambda: progress.advance(task))
    except RequestFailed as error:
        fail_request(error, target)
    for name in ("ttft_ms", "itl_ms", "handoff_gap_ms"):
        if result[name]:
            out.print(f"{name:16} " + "  ".join(f"{q} {v:8.1f}" for q, v in result[name].items()))
    out.print(
        f"{result['requests']} requests, {result['errors']} errors, {result['split_share']:.0%} split, "
        f"{result['output_tokens_per_s']:.1f} output tokens/s, goodput {result['goodput_share']:.0%} "
        f"({result['goodput_requests_per_s']:.2f} requests/s)",
        soft_wrap=True,
    )
    if out_dir is not None:
        written = write_report(result, out_dir)
        out.print("wrote " + ", ".join(str(p) for p in written), soft_wrap=True)
        if len(written) == 1:
            err.print("no plot: matplotlib is not installed (pip install matplotlib)")
    if result["errors"]:
        fail(f"{result['errors']} requests failed; the first: {result['first_error']}")


# Without a cluster.

app.command()(scaling)
app.command()(simulate)
app.command()(plan)


# Model.

app.command()(check)
app.command()(convert)


def fetch_embedded_model() -> Path:
    from deploy.model_store import ModelStoreError, ensure_embedded_model
    from settings.model_path import embedded_model_path

    if os.path.exists(embedded_model_path() / "config.json"):
        return embedded_model_path()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=err) as progress:
            task = progress.add_task("embedded model", total=1.0)
            return ensure_embedded_model(lambda what, share: progress.update(task, description=what, completed=share))
    except ModelStoreError as error:
        fail(str(error))


@app.command()
def model() -> None:
    """Fetch and convert the embedded small model, once."""
    out.print(f"embedded model: {fetch_embedded_model()}", soft_wrap=True)


add_commands(app)
add_operator_commands(app)
app.add_typer(adapters_app, name="adapters")


def main() -> None:
    try:
        app()
    except AccessError as error:  # of the environment: any command that dials may meet it
        say_error(error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
