"""A prefill and a decode worker's cores in two processes on one device, KV over NIXL, digests on.

1. both build the same random model (float32) and exchange endpoints over a pipe, which stands for gRPC here
2. the decode side answers every prompt alone: what is expected
3. the prompts are split; every pull that arrives is hashed at both ends, and the generations compared
4. answers must be those of 2; a pull announced with a wrong generation must be fenced; nothing may be left
5. the whole pool is pulled a few times: GB/s
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import queue
import time
import traceback
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu_check.context import Absent, Check, CheckFailed, significant
from benchmarks.gpu_check.models import EXACT, answer, make_core, make_runner, prompt_of
from benchmarks.report import median

_LINK = 1
_LONGEST_S = 120.0
_CHUNK = 64  # tokens a step at the source: long prompts move while they are computed
_BLOCKS_PER_ORDER = 64
_LENGTHS = (1, 31, 32, 33, 100, 257, 500, 900)
_TINY_LENGTHS = (1, 33, 150)


class _Side:
    """One worker: runner, pool, transport, and the pipe to the other side."""

    def __init__(
        self, name: str, other: str, pipe: Any, device: str, num_blocks: int, new_tokens: int, options: dict[str, Any]
    ) -> None:
        from engine.block_pool import BlockPool
        from kv_transfer.config import TransportConfig
        from kv_transfer.handoff import PeerId
        from kv_transfer.nixl_transport import NixlTransport

        torch.set_float32_matmul_precision("highest")
        if device != "cpu":
            torch.cuda.set_device(device)
        self.peer, self.other, self.pipe, self.new_tokens = PeerId(name, 1), PeerId(other, 1), pipe, new_tokens
        self.runner, _ = make_runner(torch.device(device), EXACT, "float32", num_blocks, **options)
        self.memory = self.runner.memory()
        self.pool = BlockPool(num_blocks, self.runner.generations)
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        net = "lo" if device == "cpu" else ""
        self.transport = NixlTransport(self.peer, TransportConfig(digest=True, ucx_net_devices=net), self.events.put)
        self.transport.register(self.memory)
        self.core: Any = None

    def meet(self) -> None:
        self.pipe.send(self.transport.endpoint())
        self.transport.connect(self.other, self.pipe.recv())

    def start(self, prompts: list[list[int]], **role: Any) -> None:
        from engine.types import SamplingParams
        from worker.messages import RouterCommands, RouterConnected, StartSequence

        now = time.monotonic()
        self.core.handle(RouterConnected(_LINK), now)
        for i, prompt in enumerate(prompts):
            start = StartSequence(i, f"r{i}", prompt, [], SamplingParams(max_tokens=self.new_tokens))
            self.core.handle(RouterCommands(_LINK, (replace(start, **{k: v(i) for k, v in role.items()}),)), now)

    def turn(self) -> Any:
        """Tick, step, and send what peers are to hear. Returns what the router would hear, or None."""
        self.core.tick(time.monotonic())
        heard = self._flush()
        begun = time.monotonic()
        plan = self.core.schedule(begun)
        if plan is None:
            return heard
        result = self.runner.execute(plan)
        self.core.commit(plan, result, begun, time.monotonic())
        later = self._flush()
        if heard is not None and later is not None:
            heard.merge(later)
        return heard or later

    def _flush(self) -> Any:
        outbox = self.core.take_outbox()
        if outbox is None:
            return None
        for _, message in (*outbox.to_readers, *outbox.to_sources):
            self.pipe.send(("say", message))
        return outbox.links.get(_LINK)

    def hashes(self, blocks: tuple[int, ...]) -> list[str]:
        return [hashlib.sha256(self.memory.read_block(b)).hexdigest() for b in blocks]


def source(
    pipe: Any,
    parent: Any,
    device: str,
    num_blocks: int,
    lengths: tuple[int, ...],
    new_tokens: int,
    options: dict[str, Any],
) -> None:
    """The prefill worker's process."""

    def serve() -> dict[str, Any]:
        from kv_transfer.source import HandoffSource
        from kv_transfer.transport_inprocess import block_digest
        from prefill_worker.core import PrefillCore
        from worker.messages import ReaderMessages

        side = _Side("prefill", "decode", pipe, device, num_blocks, new_tokens, options)
        handoffs = HandoffSource(
            side.pool,
            lease_s=_LONGEST_S,
            max_leases=64,
            max_leased_blocks=num_blocks,
            follow_wait_s=_LONGEST_S,
            digest=lambda block: block_digest(side.memory, block),
        )
        side.core = PrefillCore(make_core(side.runner, _CHUNK, side.pool), handoffs, report_every_s=1.0)
        side.meet()
        side.start(
            [prompt_of(n, EXACT.vocab, seed=n) for n in lengths],
            serve_handoff_id=lambda i: f"h{i}",
        )
        end, first, errors = time.monotonic() + _LONGEST_S, 0, []
        while time.monotonic() < end:
            heard = side.turn()
            if heard is not None:
                first += len(heard.token_ids)
                errors += [e.error for e in heard.ends if e.error]
            while pipe.poll(0 if side.core.has_work() else 0.001):
                match pipe.recv():
                    case ("say", message):
                        side.core.handle(ReaderMessages(side.other, (message,)), time.monotonic())
                    case ("hash", pull_id, blocks):
                        pipe.send(("hashed", pull_id, side.hashes(blocks), _generations(side, blocks)))
                    case ("generations",):
                        pipe.send(("generations", _generations(side, range(num_blocks))))
                    case ("stop",):
                        side.core.check()
                        idle = side.core.is_idle() and side.pool.is_idle()
                        return {"first_tokens": first, "errors": errors, "idle": idle}
        raise CheckFailed(f"the prefill side was not told to stop within {_LONGEST_S:g} s")

    _in_process(parent, serve)


def reader(
    pipe: Any,
    parent: Any,
    device: str,
    num_blocks: int,
    lengths: tuple[int, ...],
    new_tokens: int,
    options: dict[str, Any],
) -> None:
    """The decode worker's process."""

    def read() -> dict[str, Any]:
        from decode_worker.core import DecodeCore
        from kv_transfer.reader import HandoffReader
        from kv_transfer.transport import PullOrder, PullOutcome, PullStatus
        from worker.messages import HandoffRef, SourceMessages, Transported

        side = _Side("decode", "prefill", pipe, device, num_blocks, new_tokens, options)
        prompts = [prompt_of(n, EXACT.vocab, seed=n) for n in lengths]
        expected = [answer(side.runner, [p], new_tokens, 512)[0] for p in prompts]
        side.runner.kv.zero_()  # what is right from here on came over the wire
        orders: dict[int, PullOrder] = {}
        arrived: dict[int, list[str]] = {}

        def submit(order: PullOrder) -> None:
            orders[order.pull_id] = order
            side.transport.submit(order)

        handoffs = HandoffReader(
            side.pool,
            submit,
            side.transport.abandon,
            block_bytes=side.runner.block_bytes,
            pull_timeout_s=30.0,
            announce_timeout_s=_LONGEST_S,
            renew_every_s=3.0,
            max_blocks_per_pull=8,
            max_quarantined_blocks=num_blocks,
            numbers=itertools.count(1),
        )
        engine = make_core(side.runner, 512, side.pool)
        side.core = DecodeCore(engine, handoffs, report_every_s=1.0, room_wait_s=30.0)
        side.meet()
        side.start(prompts, pull=lambda i: HandoffRef(f"h{i}", side.other, ""))
        answers: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        wrong: list[str] = []
        adoptions: list[Any] = []
        rates: list[float] = []
        ended = compared = 0
        end = time.monotonic() + _LONGEST_S
        while ended < len(prompts) or compared < len(arrived):
            if time.monotonic() > end:
                raise CheckFailed(f"{ended} of {len(prompts)} answers within {_LONGEST_S:g} s; {wrong[:3]}")
            heard = side.turn()
            if heard is not None:
                for i, position, token in zip(heard.sequence_ids, heard.positions, heard.token_ids, strict=True):
                    if position != len(answers[i]):
                        wrong.append(f"answer {i}: position {position} came after {len(answers[i])} tokens")
                    answers[i].append(token)
                wrong += [f"answer {e.sequence_id}: {e.error}" for e in heard.ends if e.error]
                wrong += [f"handoff {f.handoff_id}: {f.reason} {f.detail}" for f in heard.handoff_failures]
                adoptions += heard.adoptions
                ended += len(heard.ends)
                if heard.handoff_failures:
                    raise CheckFailed("; ".join(wrong))
            while pipe.poll(0 if side.core.has_work() else 0.0005):
                match pipe.recv():
                    case ("say", message):
                        side.core.handle(SourceMessages(side.other, (message,)), time.monotonic())
                    case ("hashed", pull_id, hashes, generations):
                        compared += 1
                        if hashes != arrived[pull_id]:
                            wrong.append(f"pull {pull_id}: the bytes are not those of the source")
                        if tuple(generations) != orders[pull_id].generations:
                            wrong.append(f"pull {pull_id}: the source is at other generations than announced")
            while not side.events.empty():
                event = side.events.get()
                if isinstance(event, PullOutcome) and event.status is PullStatus.ARRIVED:
                    # Asked before the release can be sent: the source still holds the blocks when it hashes them.
                    order = orders[event.pull_id]
                    arrived[event.pull_id] = side.hashes(order.local_blocks)
                    pipe.send(("hash", event.pull_id, order.remote_blocks))
                    rates.append(len(order.local_blocks) * side.runner.block_bytes / max(event.duration_s, 1e-9) / 1e9)
                side.core.handle(Transported(event), time.monotonic())
        for i, (want, got) in enumerate(zip(expected, answers.values(), strict=True)):
            if want != got:
                wrong.append(f"prompt of {lengths[i]}: split gave {got[:8]}..., one engine {want[:8]}...")
        side.core.check()
        if not (side.core.is_idle() and side.pool.is_idle()):
            wrong.append("the decode side still holds sequences or blocks")

        pipe.send(("generations",))
        while (message := pipe.recv())[0] != "generations":
            pass
        generations = message[1]
        stale = _pull(side, PullOrder(1 << 40, side.other, (0,), (0,), (generations[0] + 1,), (), 10.0))
        if stale.status is not PullStatus.FENCED:
            wrong.append(f"a pull with a wrong generation ended as {stale.status}")
        bulk = _bulk_seconds(side, generations)
        pipe.send(("stop",))
        return {
            "wrong": wrong,
            "transport": side.transport.describe(),
            "memory": side.memory.device,
            "answers": len(prompts),
            "pulls_compared": compared,
            "blocks_compared": sum(len(o.local_blocks) for o in orders.values()),
            "block_kib": side.runner.block_bytes / 1024,
            "pulled_bytes": sum(a.pulled_bytes for a in adoptions),
            "early_share": significant(median([a.kv_early_share for a in adoptions]), 3),
            "adopt_ms": significant(median([a.adopt_ms for a in adoptions]), 3),
            "gb_per_s_per_pull": significant(median(rates), 3),
            "bulk_mib": side.runner.block_bytes * num_blocks / 2**20,
            "bulk_gb_per_s": significant(side.runner.block_bytes * num_blocks / bulk / 1e9, 3),
            "wrong_generation": stale.status.value,
        }

    _in_process(parent, read)


def _generations(side: _Side, blocks: Any) -> list[int]:
    return [side.pool.generation(b) for b in blocks]


def _pull(side: _Side, order: Any) -> Any:
    side.transport.submit(order)
    return side.events.get(timeout=30)


def _bulk_seconds(side: _Side, generations: list[int]) -> float:
    from kv_transfer.transport import PullOrder, PullStatus

    numbers = itertools.count(1 << 41)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        count = 0
        for first in range(0, len(generations), _BLOCKS_PER_ORDER):
            ids = tuple(range(first, min(first + _BLOCKS_PER_ORDER, len(generations))))
            own = tuple(generations[first : first + len(ids)])
            side.transport.submit(PullOrder(next(numbers), side.other, ids, ids, own, (), 60.0))
            count += 1
        for _ in range(count):
            outcome = side.events.get(timeout=60)
            if outcome.status is not PullStatus.ARRIVED:
                raise CheckFailed(f"a pull of the whole pool ended as {outcome.status}: {outcome.detail}")
        times.append(time.perf_counter() - begun)
    return median(times[1:])


def _in_process(parent: Any, work: Any) -> None:
    """Says to the parent what came out, then waits: a peer may still need this process's memory."""
    try:
        said: tuple[str, Any] = ("done", work())
    except BaseException:
        said = ("failed", traceback.format_exc())
    parent.send(said)
    parent.recv()
    os._exit(0)  # NIXL's own teardown is not what is measured here


def handoff(check: Check, found: dict[str, Any]) -> None:
    if not any(find_spec(m) is not None for m in ("nixl_cu12", "nixl_cu13", "nixl")):
        raise Absent("nixl not present")
    import kv_transfer.nixl_transport  # noqa: F401  what it lacks is said here rather than in a child

    lengths = _TINY_LENGTHS if check.tiny else _LENGTHS
    num_blocks, new_tokens = (200, 5) if check.tiny else (2048, 32)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    sides: dict[str, tuple[Any, Any]] = {}
    for target, name, pipe in ((source, "prefill side", ours), (reader, "decode side", theirs)):
        mine, its = context.Pipe()
        arguments = (pipe, its, str(check.device), num_blocks, lengths, new_tokens, check.engine_options())
        sides[name] = (context.Process(target=target, args=arguments, daemon=True), mine)
    for process, _ in sides.values():
        process.start()
    try:
        results = _results(sides, time.monotonic() + min(2 * _LONGEST_S, max(60.0, check.left_s())))
        for _, pipe in sides.values():
            pipe.send("go")
        for process, _ in sides.values():
            process.join(10)
    finally:
        for process, _ in sides.values():
            process.kill()
            process.join()
    at_source, at_reader = results["prefill side"], results["decode side"]
    found.update({k: v for k, v in at_reader.items() if k != "wrong"})
    wrong = [*at_reader["wrong"], *at_source["errors"]]
    if at_source["first_tokens"] != len(lengths):
        wrong.append(f"the prefill side gave {at_source['first_tokens']} first tokens for {len(lengths)} prompts")
    if not at_source["idle"]:
        wrong.append("the prefill side still holds sequences, leases or blocks")
    found["wrong"] = wrong
    check.table(("handoff", ""), [(k, v) for k, v in found.items() if k not in ("status", "took_s")])
    if wrong:
        raise CheckFailed("; ".join(wrong[:5]))


def _results(sides: dict[str, tuple[Any, Any]], until: float) -> dict[str, Any]:
    results: dict[str, Any] = {}
    while len(results) < len(sides):
        waiting = {pipe: name for name, (_, pipe) in sides.items() if name not in results}
        # A process that dies closes nothing that we would see: its sentinel tells.
        sentinels = {process.sentinel: name for name, (process, _) in sides.items() if name not in results}
        ready = multiprocessing.connection.wait([*waiting, *sentinels], timeout=max(0.0, until - time.monotonic()))
        if not ready:
            raise CheckFailed(f"no word from the {' and the '.join(waiting.values())} in time")
        for pipe, name in waiting.items():
            if not pipe.poll():
                continue
            word, value = pipe.recv()
            if word == "failed":
                raise CheckFailed(f"the {name} failed:\n{value}")
            results[name] = value
        for sentinel, name in sentinels.items():
            if sentinel in ready and name not in results:
                raise CheckFailed(f"the {name}'s process died with exit code {sides[name][0].exitcode}")
    return results
