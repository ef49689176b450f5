"""A prefill and a decode worker's cores in two processes on one device, KV over NIXL, digests on.

1. both build the same random model (float32) and exchange endpoints over a pipe, which stands for gRPC here
2. the decode side answers every prompt alone: what is expected
3. the prompts are split; every pull that arrives is hashed at both ends, and the generations compared
4. answers must be those of 2; of every group of layers something must have moved; a pull announced with a wrong
   generation must be fenced; nothing may be left
5. the whole pool is pulled a few times: GB/s
6. the same with models of several groups: windows, latents, states
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
from collections import Counter
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu_check.context import Absent, Check, CheckFailed, significant
from benchmarks.gpu_check.families import FAMILIES
from benchmarks.gpu_check.models import EXACT, Model, answer, make_core, make_runner, prompt_of
from benchmarks.report import median
from engine.kv_shape import parts

_LINK = 1
_LONGEST_S = 120.0
_CHUNK = 64  # tokens a step at the source: long prompts move while they are computed
_BLOCKS_PER_ORDER = 64
_LENGTHS = (1, 31, 32, 33, 100, 257, 500, 900)
_TINY_LENGTHS = (1, 33, 150)
_FAMILY_LENGTHS, _TINY_FAMILY_LENGTHS = (1, 33, 100, 257, 450), (33, 150)
_MOVED_FAMILIES = ("GptOssConfig", "DeepseekV3Config", "FalconH1Config")  # beside full attention: window, latent, state
_CLOSE_S = 10.0


@dataclass(frozen=True, slots=True)
class Job:
    """What both processes are given, once for each model."""

    model: Model
    lengths: tuple[int, ...]
    num_blocks: int
    new_tokens: int
    device: str
    options: dict[str, Any]

    def prompts(self) -> list[list[int]]:
        return [prompt_of(n, self.model.vocab, seed=n) for n in self.lengths]


class _Side:
    """One worker: runner, pool, transport, and the pipe to the other side."""

    def __init__(self, name: str, other: str, number: int, pipe: Any, job: Job) -> None:
        from engine.block_pool import BlockPool
        from kv_transfer.config import TransportConfig
        from kv_transfer.handoff import PeerId
        from kv_transfer.nixl_transport import NixlTransport

        torch.set_float32_matmul_precision("highest")
        if job.device != "cpu":
            torch.cuda.set_device(job.device)
        self.peer, self.other, self.pipe, self.job = PeerId(name, number), PeerId(other, number), pipe, job
        self.runner, _ = make_runner(torch.device(job.device), job.model, "float32", job.num_blocks, **job.options)
        self.memory = self.runner.memory()
        self.pool = BlockPool(self.runner.num_blocks, self.runner.generations)
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        net = "lo" if job.device == "cpu" else ""
        self.transport = NixlTransport(self.peer, TransportConfig(digest=True, ucx_net_devices=net), self.events.put)
        self.transport.register(self.memory)
        self.core: Any = None

    def meet(self) -> None:
        self.pipe.send(("endpoint", self.transport.endpoint()))
        self.transport.connect(self.other, _next(self.pipe, "endpoint")[1])

    def close(self) -> None:
        self.transport.close(_CLOSE_S)

    def start(self, **role: Any) -> None:
        from engine.types import SamplingParams
        from worker.messages import RouterCommands, RouterConnected, StartSequence

        now = time.monotonic()
        self.core.handle(RouterConnected(_LINK), now)
        for i, prompt in enumerate(self.job.prompts()):
            start = StartSequence(i, f"r{i}", prompt, [], SamplingParams(max_tokens=self.job.new_tokens))
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


def _next(pipe: Any, *words: str) -> Any:
    """The next message of these; what was still said of an earlier model is passed over."""
    while (message := pipe.recv())[0] not in words:
        pass
    return message


def source(pipe: Any, parent: Any, jobs: list[Job]) -> None:
    """The prefill worker's process."""

    def serve() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, job in enumerate(jobs, start=1):
            if _next(pipe, "job", "no more")[0] == "no more":
                break
            found[job.model.name] = serve_model(pipe, number, job)
        return found

    _in_process(parent, serve)


def serve_model(pipe: Any, number: int, job: Job) -> dict[str, Any]:
    from kv_transfer.source import HandoffSource
    from kv_transfer.transport_inprocess import block_digest
    from prefill_worker.core import PrefillCore
    from worker.messages import ReaderMessages

    side = _Side("prefill", "decode", number, pipe, job)
    handoffs = HandoffSource(
        side.pool,
        lease_s=_LONGEST_S,
        max_leases=64,
        max_leased_blocks=side.memory.num_blocks,
        follow_wait_s=_LONGEST_S,
        digest=lambda block: block_digest(side.memory, block),
    )
    side.core = PrefillCore(make_core(side.runner, _CHUNK, side.pool), handoffs, report_every_s=1.0)
    side.meet()
    side.start(serve_handoff_id=lambda i: f"h{i}")
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
                    pipe.send(("generations", _generations(side, range(side.memory.num_blocks))))
                case ("stop",):
                    side.core.check()
                    idle = side.core.is_idle() and side.pool.is_idle()
                    side.close()
                    return {"first_tokens": first, "errors": errors, "idle": idle}
    raise CheckFailed(f"{job.model.name}: the prefill side was not told to stop within {_LONGEST_S:g} s")


def reader(pipe: Any, parent: Any, jobs: list[Job], end: float) -> None:
    """The decode worker's process. Says which model is next, as long as there is time."""

    def read() -> dict[str, Any]:
        found: dict[str, Any] = {}
        longest = 0.0
        for number, job in enumerate(jobs, start=1):
            begun = time.monotonic()
            if end - begun < 1.5 * longest:
                pipe.send(("no more",))
                break
            pipe.send(("job",))
            found[job.model.name] = read_model(pipe, number, job)
            longest = max(longest, time.monotonic() - begun)
        return found

    _in_process(parent, read)


def read_model(pipe: Any, number: int, job: Job) -> dict[str, Any]:
    from decode_worker.core import DecodeCore
    from kv_transfer.reader import HandoffReader
    from kv_transfer.transport import PullOrder, PullOutcome, PullStatus
    from worker.messages import HandoffRef, SourceMessages, Transported

    side = _Side("decode", "prefill", number, pipe, job)
    memory, prompts = side.memory, job.prompts()
    expected = [answer(side.runner, [p], job.new_tokens, 512)[0] for p in prompts]
    for area in parts(side.runner.kv):
        area.zero_()  # what is right from here on came over the wire
    orders: dict[int, PullOrder] = {}
    arrived: dict[int, list[str]] = {}

    def submit(order: PullOrder) -> None:
        orders[order.pull_id] = order
        side.transport.submit(order)

    handoffs = HandoffReader(
        side.pool,
        submit,
        side.transport.abandon,
        block_bytes=side.runner.block_bytes_by_group,
        pull_timeout_s=30.0,
        announce_timeout_s=_LONGEST_S,
        renew_every_s=3.0,
        max_blocks_per_pull=[8] * len(memory.areas),
        max_quarantined_blocks=memory.num_blocks,
        numbers=itertools.count(1),
    )
    engine = make_core(side.runner, 512, side.pool)
    side.core = DecodeCore(engine, handoffs, report_every_s=1.0, room_wait_s=30.0)
    side.meet()
    side.start(pull=lambda i: HandoffRef(f"h{i}", side.other, ""))
    answers: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    wrong: list[str] = []
    adoptions: list[Any] = []
    rates: list[float] = []
    ended = compared = 0
    end = time.monotonic() + _LONGEST_S
    while ended < len(prompts) or compared < len(arrived):
        if time.monotonic() > end:
            raise CheckFailed(
                f"{job.model.name}: {ended} of {len(prompts)} answers within {_LONGEST_S:g} s; {wrong[:3]}"
            )
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
                raise CheckFailed(f"{job.model.name}: " + "; ".join(wrong))
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
                rates.append(memory.bytes_of(order.local_blocks) / max(event.duration_s, 1e-9) / 1e9)
            side.core.handle(Transported(event), time.monotonic())
    for i, (want, got) in enumerate(zip(expected, answers.values(), strict=True)):
        if want != got:
            wrong.append(f"prompt of {job.lengths[i]}: split gave {got[:8]}..., one engine {want[:8]}...")
    side.core.check()
    if not (side.core.is_idle() and side.pool.is_idle()):
        wrong.append("the decode side still holds sequences or blocks")
    moved = Counter(memory.area_of(block) for order in orders.values() for block in order.local_blocks)
    rules = [str(group.rule) for group in side.runner.facts.groups]
    wrong += [f"nothing of the group {rule} was moved" for area, rule in enumerate(rules) if not moved[area]]

    pipe.send(("generations",))
    generations = _next(pipe, "generations")[1]
    stale = _pull(side, PullOrder(1 << 40, side.other, (0,), (0,), (generations[0] + 1,), (), 10.0))
    if stale.status is not PullStatus.FENCED:
        wrong.append(f"a pull with a wrong generation ended as {stale.status}")
    bulk = _bulk_seconds(side, generations)
    pool_bytes = memory.bytes_of(range(memory.num_blocks))
    pipe.send(("stop",))
    side.close()
    return {
        "wrong": wrong,
        "transport": side.transport.describe(),
        "memory": memory.device,
        "answers": len(prompts),
        "pulls_compared": compared,
        "blocks_compared": sum(moved.values()),
        "blocks_by_group": {rule: moved[area] for area, rule in enumerate(rules)},
        "block_kib_by_group": [area.block_bytes / 1024 for area in memory.areas],
        "pulled_bytes": sum(a.pulled_bytes for a in adoptions),
        "early_share": significant(median([a.kv_early_share for a in adoptions]), 3),
        "adopt_ms": significant(median([a.adopt_ms for a in adoptions]), 3),
        "gb_per_s_per_pull": significant(median(rates), 3),
        "bulk_mib": pool_bytes / 2**20,
        "bulk_gb_per_s": significant(pool_bytes / bulk / 1e9, 3),
        "wrong_generation": stale.status.value,
    }


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

    jobs = jobs_of(check)
    # What a model is left out for, and what both processes are ended at.
    end = time.monotonic() + check.left_s()
    until = max(end, time.monotonic() + 60.0) + _CLOSE_S
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    sides: dict[str, tuple[Any, Any]] = {}
    for target, name, pipe, more in ((source, "prefill side", ours, ()), (reader, "decode side", theirs, (end,))):
        mine, its = context.Pipe()
        sides[name] = (context.Process(target=target, args=(pipe, its, jobs, *more), daemon=True), mine)
    for process, _ in sides.values():
        process.start()
    try:
        results = _results(sides, until)
        for _, pipe in sides.values():
            pipe.send("go")
        for process, _ in sides.values():
            process.join(10)
    finally:
        for process, _ in sides.values():
            process.kill()
            process.join()
    wrong: list[str] = []
    for job in jobs:
        name = job.model.name
        at_source, at_reader = results["prefill side"].get(name), results["decode side"].get(name)
        if at_source is None or at_reader is None:
            found.setdefault("left_out", []).append(f"{name}: the time was over")
            continue
        own = [*at_reader.pop("wrong"), *at_source["errors"]]
        if at_source["first_tokens"] != len(job.lengths):
            own.append(f"the prefill side gave {at_source['first_tokens']} first tokens for {len(job.lengths)} prompts")
        if not at_source["idle"]:
            own.append("the prefill side still holds sequences, leases or blocks")
        found[name] = at_reader
        wrong += [f"{name}: {w}" for w in own]
        check.table((f"handoff, {name}", ""), list(at_reader.items()))
    found["wrong"] = wrong
    if wrong:
        raise CheckFailed("; ".join(wrong[:5]))


def jobs_of(check: Check) -> list[Job]:
    num_blocks, new_tokens = (200, 5) if check.tiny else (2048, 32)
    shared: tuple[Any, ...] = (num_blocks, new_tokens, str(check.device), check.engine_options())
    jobs = [Job(EXACT, _TINY_LENGTHS if check.tiny else _LENGTHS, *shared)]
    lengths = _TINY_FAMILY_LENGTHS if check.tiny else _FAMILY_LENGTHS
    return jobs + [Job(f, lengths, *shared) for f in FAMILIES if f.made_of in _MOVED_FAMILIES]


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
