"""A small KV memory of one or several areas, and a process that serves one over NIXL."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kv_transfer.transport import AreaParts, KvArea, KvMemory

ROOT = Path(__file__).resolve().parents[2]


Shape = tuple[int, int]  # of an area: blocks, bytes of each
_GUARD_BYTES = 4096


class Pool:
    """Its areas lie between guards: what is written beside a block is seen. `poison` is in every byte at first."""

    def __init__(self, areas: Sequence[Shape], poison: int = 0, memory: np.ndarray | None = None) -> None:
        """`memory`: to lie in, of `bytes_of(areas)`."""
        self.poison = poison
        self._all = np.empty(self.bytes_of(areas), dtype=np.uint8) if memory is None else memory
        self._all[:] = poison
        self.blocks: list[np.ndarray] = []  # by id
        self.areas: list[KvArea] = []
        self._guards = [self._all[:_GUARD_BYTES]]
        at = _GUARD_BYTES
        for count, size in areas:
            area = self._all[at : at + count * size].reshape(count, size)
            at += count * size + _GUARD_BYTES
            self._guards.append(self._all[at - _GUARD_BYTES : at])
            self.blocks.extend(area)
            self.areas.append(KvArea(area.ctypes.data, size, count))
        self.generations = np.zeros(len(self.blocks), dtype=np.uint64)

    @staticmethod
    def bytes_of(areas: Sequence[Shape]) -> int:
        return _GUARD_BYTES + sum(n * size + _GUARD_BYTES for n, size in areas)

    def memory(self) -> KvMemory:
        return KvMemory(
            areas=tuple(self.areas),
            device="cpu",
            generations=self.generations,
            read_block=lambda i: memoryview(self.blocks[i]),  # type: ignore[arg-type]
        )

    def check(self) -> None:
        """Nothing was written beside the areas."""
        assert all((guard == self.poison).all() for guard in self._guards)


class SourceProcess:
    """A NIXL source in a process of its own: `python -m tests.support.kv_pool`. Commands are JSON lines."""

    def __init__(self, areas: Sequence[Shape], transport: dict[str, Any], epoch: int = 1, rank: int = 0) -> None:
        config = {"areas": areas, "transport": transport, "epoch": epoch, "rank": rank}
        self.rank = rank
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
    pool = Pool(config["areas"])
    transport = NixlTransport(
        PeerId("source", config["epoch"], config["rank"]), TransportConfig(**config["transport"]), lambda event: None
    )
    transport.register(pool.memory())
    print(json.dumps({"endpoint": transport.endpoint().hex()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        match command["do"]:
            case "connect":
                reader = PeerId(command["worker"], command["epoch"], command.get("rank", 0))
                parts = tuple(AreaParts(own, their, ()) for own, their in command.get("parts", ())) or None
                transport.connect(reader, bytes.fromhex(command["endpoint"]), parts)
            case "early":
                answer["early"] = len(transport._early)
            case "fill":
                pool.blocks[command["block"]][:] = command["value"]
            case "write":
                pool.blocks[command["block"]][:] = np.frombuffer(bytes.fromhex(command["bytes"]), dtype=np.uint8)
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
