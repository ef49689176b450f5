"""A small KV pool in host memory, and a process that serves one over NIXL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kv_transfer.transport import KvMemory

ROOT = Path(__file__).resolve().parents[2]


class Pool:
    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.bytes = np.zeros((num_blocks, block_bytes), dtype=np.uint8)
        self.generations = np.zeros(num_blocks, dtype=np.uint64)

    def memory(self) -> KvMemory:
        return KvMemory(
            base_address=self.bytes.ctypes.data,
            block_bytes=self.bytes.shape[1],
            num_blocks=len(self.bytes),
            device="cpu",
            generations=self.generations,
            read_block=lambda i: memoryview(self.bytes[i]),  # type: ignore[arg-type]
        )


class SourceProcess:
    """A NIXL source in a process of its own: `python -m tests.support.kv_pool`. Commands are JSON lines."""

    def __init__(self, num_blocks: int, block_bytes: int, transport: dict[str, Any], epoch: int = 1) -> None:
        config = {"num_blocks": num_blocks, "block_bytes": block_bytes, "transport": transport, "epoch": epoch}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.kv_pool", json.dumps(config)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.endpoint = bytes.fromhex(self._read()["endpoint"])

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while True:
            line = self.process.stdout.readline()
            assert line, f"the source ended with {self.process.wait()}"
            if line.startswith("{"):
                return json.loads(line)

    def command(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            try:
                self.command(do="exit")
                self.process.wait(10)
            except (BrokenPipeError, AssertionError, subprocess.TimeoutExpired):
                self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def main() -> None:
    from kv_transfer.config import TransportConfig
    from kv_transfer.handoff import PeerId
    from kv_transfer.nixl_transport import NixlTransport
    from kv_transfer.transport_inprocess import block_digest

    config = json.loads(sys.argv[1])
    pool = Pool(config["num_blocks"], config["block_bytes"])
    transport = NixlTransport(
        PeerId("source", config["epoch"]), TransportConfig(**config["transport"]), lambda event: None
    )
    transport.register(pool.memory())
    print(json.dumps({"endpoint": transport.endpoint().hex()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        match command["do"]:
            case "connect":
                transport.connect(PeerId(command["worker"], command["epoch"]), bytes.fromhex(command["endpoint"]))
            case "fill":
                pool.bytes[command["block"]] = command["value"]
            case "generation":
                pool.generations[command["block"]] = command["value"]
            case "digest":
                answer["digest"] = block_digest(pool.memory(), command["block"])
            case "exit":
                transport.close(5.0)
                print(json.dumps(answer), flush=True)
                return
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
