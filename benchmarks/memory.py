"""Memory of processes that serve and have nothing to do, in MB: routers by their tokenizer's class, a decode worker.

`own` is memory that no other process shares (RssAnon), `files` are pages of libraries and of the model's file that the
kernel takes back when it needs them (RssFile), `shared` is the KV pool where it lies in shared memory. `peak` is the
most since the start. A worker's line says what is left without weights and KV.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from diptych.v1 import cluster_pb2

from benchmarks.children import wait_until
from benchmarks.report import parse, save, table
from benchmarks.router import free_port
from deploy.clients import channel_to, get_cluster
from deploy.processes import Processes
from engine.config import EngineConfig
from settings.model_path import resolve_model

START_S = 240.0
CLASSES = ("TokenizersBackend", "Qwen2Tokenizer")  # one that tokenizer.json is all of, one that transformers adds to
NUM_BLOCKS = 512


def memory_mb(pid: int) -> dict[str, float]:
    stated = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    names = {"rss": "VmRSS", "own": "RssAnon", "files": "RssFile", "shared": "RssShmem", "peak": "VmHWM"}
    found = {name: int(stated[field].split()[0]) / 1024 for name, field in names.items()}
    return found | {"threads": int(stated["Threads"]), "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir()))}


def with_class(model: Path, name: str, directory: Path) -> Path:
    """The model's directory, its weights as links, with a tokenizer of this class."""
    to = directory / name
    to.mkdir()
    for file in model.iterdir():
        (to / file.name).symlink_to(file)
    stated = json.loads((model / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (to / "tokenizer_config.json").unlink()
    (to / "tokenizer_config.json").write_text(json.dumps(stated))
    return to


def block_bytes(model: Path) -> int:
    """Of a plain model that is held in bfloat16."""
    config = json.loads((model / "config.json").read_text())
    elements = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return 2 * elements * EngineConfig(model=str(model)).block_tokens


def measure(model: Path, directory: Path, *, worker: bool) -> dict[str, dict[str, Any]]:
    """A router alone, or a router and a decode worker."""
    port, internal = free_port(), free_port()
    target, home = f"127.0.0.1:{port}", directory / f"processes-{model.name}-{worker}"
    home.mkdir()
    processes = Processes(home)
    ports = {"grpc_port": port, "internal_port": internal, "http_port": free_port()}

    def there() -> bool:
        ended = processes.ended()
        if ended:
            words = "\n".join((home / f"{name}.log").read_text()[-2000:] for name in ended)
            raise SystemExit(f"ended: {ended}\n{words}")
        if "listens on" not in (home / "router.log").read_text():
            return False
        if not worker:
            return True
        with channel_to(target) as channel:
            return any(card.state == cluster_pb2.WORKER_STATE_READY for card in get_cluster(channel, 10.0).workers)

    try:
        processes.spawn("router", "router", {"router": {"model": str(model), **ports}})
        if worker:
            engine = {"model": str(model), "num_blocks": NUM_BLOCKS}
            settings = {"router_addresses": [f"127.0.0.1:{internal}"], "port": 0}
            processes.spawn("decode", "decode_worker", {"engine": engine, "worker": settings})
        wait_until(there, START_S, "processes that serve")
        found: dict[str, dict[str, Any]] = {name: memory_mb(p.pid) for name, p in processes.running.items()}
        if worker:
            weights = sum(f.stat().st_size for f in model.glob("*.safetensors")) / 2**20
            kv = NUM_BLOCKS * block_bytes(model) / 2**20
            found["decode"] |= {"weights": weights, "kv": kv, "rest": found["decode"]["rss"] - weights - kv}
        return found
    finally:
        processes.stop(10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action=argparse.BooleanOptionalAction, default=True)
    arguments = parse(parser, worker=False)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory, model = Path(name), Path(resolve_model("embedded"))
        for tokenizer in CLASSES:
            path = with_class(model, tokenizer, directory)
            found[f"router, {tokenizer}"] = measure(path, directory, worker=False)["router"]
            shutil.rmtree(path)
        if arguments.worker:
            found["decode worker"] = measure(model, directory, worker=True)["decode"]
    columns = ("rss", "own", "files", "shared", "peak", "threads", "descriptors", "weights", "kv", "rest")
    rows = [(name, *(f"{f[c]:.0f}" if c in f else "" for c in columns)) for name, f in found.items()]
    table(("MB, idle", *columns), rows)
    save("memory", {"mb": found, "num_blocks": NUM_BLOCKS})


if __name__ == "__main__":
    main()
