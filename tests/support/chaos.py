"""Load on a cluster of real processes while faults are injected, one at a time, and what every request then saw.

    cases     requests with known answers, recorded before any fault
    Load      clients, through Generate and through Session, that keep the routers busy
    plan      a seed's faults, the same every time
    Driver    injects one, waits until the cluster is whole again, lets it run, injects the next
    judge     every answer against the undisturbed one; every other end against its deadline

A request ends as `complete` (its tokens are then the undisturbed ones), as `error` (a status with a message, in time),
or as `cancelled` (by the client). Whatever its end, what it was sent before is a prefix of the undisturbed answer.
"""

from __future__ import annotations

import itertools
import os
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from diptych.v1 import cluster_pb2, cluster_pb2_grpc, generate_pb2, generate_pb2_grpc
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from tests.support.processes import Cluster, free_port
from tests.support.prompts import tokens_of

AUTO, LOCAL, SPLIT = generate_pb2.PLACEMENT_AUTO, generate_pb2.PLACEMENT_LOCAL, generate_pb2.PLACEMENT_SPLIT
GRACE_S = 4.0  # after its deadline a request may still take so long to end: shared machines stall
HONEST_CODES = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
RETRYABLE = {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}
_CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


# The cluster.


@dataclass
class ChaosCluster(Cluster):
    """Several routers, with which every worker registers. Single workers may be configured differently."""

    routers: int = 2
    by_worker: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ports = [(self.port, self.internal_port)] + [(free_port(), free_port()) for _ in range(self.routers - 1)]
        self.channels: list[grpc.Channel] = []
        self.spawned: list[tuple[str, int]] = []
        self._frozen: set[str] = set()

    @property
    def workers(self) -> list[str]:
        return [f"{role}-{i}" for role, n in (("prefill", self.prefill), ("decode", self.decode)) for i in range(n)]

    def start(self, timeout_s: float = 90.0) -> ChaosCluster:
        for i in range(self.routers):
            self.start_router(i)
        for worker in self.workers:
            self.start_worker(worker.split("-")[0], worker)
        self.channels = [grpc.insecure_channel(self.target_of(i), options=_CHANNEL) for i in range(self.routers)]
        self.channel = self.channels[0]
        self.stub = generate_pb2_grpc.GenerateServiceStub(self.channel)
        self.wait_whole(timeout_s)
        return self

    def target_of(self, router: int) -> str:
        return f"127.0.0.1:{self.ports[router][0]}"

    def start_router(self, i: int) -> None:
        public, internal = self.ports[i]
        config = self._router_config()
        config["router"] |= {"grpc_port": public, "http_port": None, "internal_port": internal}
        self._spawn(f"router-{i}", "router", config)

    def start_worker(self, role: str, worker_id: str, **transport: Any) -> None:
        config = self._worker_config(role, worker_id)
        config["worker"]["router_addresses"] = self.router_addresses()
        for section, values in self.by_worker.get(worker_id, {}).items():
            config[section] |= values
        config["transport"] |= transport
        self._spawn(worker_id, f"{role}_worker", config)

    def router_addresses(self) -> list[str]:
        return [f"127.0.0.1:{internal}" for _, internal in self.ports]

    def start_again(self, name: str, **transport: Any) -> None:
        role, number = name.split("-")
        if role == "router":
            self.start_router(int(number))
        else:
            self.start_worker(role, name, **transport)

    def _spawn(self, name: str, module: str, config: dict[str, Any]) -> None:
        self.processes.spawn(name, module, config)
        self.spawned.append((name, self.processes.running[name].pid))

    def freeze(self, name: str) -> None:
        self._frozen.add(name)
        self.processes.running[name].send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self.processes.running[name].send_signal(signal.SIGCONT)
        self._frozen.discard(name)

    def drain(self, name: str, timeout_s: float) -> None:
        """SIGTERM; it must leave by itself, with code 0."""
        process = self.processes.running[name]
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while process.poll() is None:
            assert time.monotonic() < deadline, f"{name} did not leave within {timeout_s} s\n{self.logs()}"
            time.sleep(0.02)
        del self.processes.running[name]
        assert process.returncode == 0, f"{name} left with {process.returncode}\n{self.logs()}"

    def stop(self, timeout_s: float = 30.0) -> None:
        for name in list(self._frozen & self.processes.running.keys()):
            self.thaw(name)
        for channel in self.channels:
            channel.close()
        stuck = self.processes.stop(timeout_s, last="router-0")
        assert not stuck, f"did not leave on SIGTERM within {timeout_s} s: {stuck}\n{self.logs()}"

    # Looks.

    def seen_by(self, router: int) -> cluster_pb2.Cluster:
        stub = cluster_pb2_grpc.ClusterServiceStub(self.channels[router])
        return stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=3).cluster

    def epochs(self) -> dict[str, int]:
        """Of the workers that every router sees as ready; empty while a router does not answer."""
        seen: list[dict[str, int]] = []
        for i in range(self.routers):
            try:
                state = self.seen_by(i)
            except grpc.RpcError:
                return {}
            if not state.router.serving:
                return {}
            ready = [w for w in state.workers if w.state == cluster_pb2.WORKER_STATE_READY]
            seen.append({w.worker_id: w.epoch for w in ready})
        return {w: e for w, e in seen[0].items() if all(other.get(w) == e for other in seen)}

    def wait_whole(self, timeout_s: float = 60.0, later_than: Mapping[str, int] | None = None) -> None:
        """Every worker ready at every router; those named as an incarnation later than that (in ns)."""

        def whole() -> bool:
            epochs = self.epochs()
            return all(w in epochs and epochs[w] > (later_than or {}).get(w, 0) for w in self.workers)

        self.wait_until(whole, timeout_s, "every worker ready at every router")

    def assert_nothing_left(self, timeout_s: float = 30.0) -> None:
        def problems() -> list[str]:
            out = []
            for i in range(self.routers):
                state = self.seen_by(i)
                if state.router.live_requests:
                    out.append(f"router-{i}: {state.router.live_requests} live requests")
                for w in state.workers:
                    if w.state != cluster_pb2.WORKER_STATE_READY:
                        continue
                    held = {
                        "dispatched": w.dispatched_requests,
                        "running": w.load.running_sequences,
                        "waiting": w.load.waiting_sequences,
                        "leases": w.load.active_leases,
                        "leased": w.load.leased_blocks,
                        "quarantined": w.load.quarantined_blocks,
                        "used": w.load.total_blocks - w.load.free_blocks,
                    }
                    if any(held.values()):
                        out.append(f"{w.worker_id} (by router-{i}): { {k: v for k, v in held.items() if v} }")
            return out

        deadline = time.monotonic() + timeout_s
        while left := problems():
            assert time.monotonic() < deadline, f"left after {timeout_s} s: {left}\n{self.logs()}"
            time.sleep(0.1)

    def open_files(self) -> dict[str, int]:
        return {name: len(os.listdir(f"/proc/{p.pid}/fd")) for name, p in self.processes.running.items()}

    def left_processes(self) -> list[str]:
        """Anything that still runs out of this cluster's directory."""
        left = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                try:
                    line = Path(f"/proc/{entry}/cmdline").read_bytes()
                except OSError:
                    continue
                if f"--config\0{self.directory}/".encode() in line:
                    left.append(entry + ": " + line.replace(b"\0", b" ").decode())
        return left


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def leaked_shared_memory(before: set[str], pids: Sequence[int]) -> list[str]:
    """New files in /dev/shm that no living process maps, and System V segments that ours created."""
    leaked = shared_memory() - before
    if leaked:
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    maps = Path(f"/proc/{entry}/maps").read_text()
                except OSError:
                    continue
                leaked -= {name for name in leaked if f"/dev/shm/{name}" in maps}
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return sorted(leaked) + [f"sysv {row[1]} of {row[4]}" for row in rows if int(row[4]) in pids]


# Requests with known answers.


@dataclass(frozen=True)
class Case:
    """`salt` None: a fresh one for every request, so that no cache helps."""

    name: str
    prompt: tuple[int, ...]
    sampling: generate_pb2.SamplingParams
    placement: int
    salt: str | None = None

    def request(self, salt: str, deadline_s: float, request_id: str = "") -> generate_pb2.GenerateRequest:
        return generate_pb2.GenerateRequest(
            request_id=request_id,
            token_ids=generate_pb2.TokenIds(ids=self.prompt),
            sampling=self.sampling,
            placement=self.placement,
            cache_salt=salt if self.salt is None else self.salt,
            deadline_ms=int(deadline_s * 1e3),
        )

    @property
    def greedy(self) -> bool:
        return not self.sampling.temperature


@dataclass(frozen=True)
class Answer:
    token_ids: tuple[int, ...]
    text: str
    reason: int


def cases_of(tokenizer: Any) -> list[Case]:
    """Short ones that stay on decode, long ones that are split, some with a prefix in common."""

    def sampled(seed: int, max_tokens: int) -> generate_pb2.SamplingParams:
        return generate_pb2.SamplingParams(
            temperature=0.8, top_p=0.95, top_k=50, seed=seed, repetition_penalty=1.05, max_tokens=max_tokens
        )

    def greedy(max_tokens: int) -> generate_pb2.SamplingParams:
        return generate_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True)

    def words(length: int, seed: int) -> tuple[int, ...]:
        return tuple(tokens_of(tokenizer, length, seed=seed))

    shared = words(256, 90)
    return [
        Case("short greedy", words(12, 1), greedy(24), AUTO),
        Case("short sampled", words(33, 2), sampled(5, 24), AUTO),
        Case("short split", words(64, 3), greedy(16), SPLIT),
        Case("medium sampled", words(150, 4), sampled(6, 16), AUTO),
        Case("long greedy", words(420, 5), greedy(20), AUTO),
        Case("long sampled", words(385, 6), sampled(7, 20), SPLIT),
        Case("long local", words(300, 7), greedy(12), LOCAL),
        Case("long split", words(512, 8), greedy(12), SPLIT),
        Case("shared prefix a", shared + words(40, 91), greedy(12), AUTO, salt="shared"),
        Case("shared prefix b", shared + words(70, 92), sampled(8, 12), SPLIT, salt="shared"),
        Case("one token", words(200, 9), greedy(1), SPLIT),
    ]


def big_cases_of(tokenizer: Any) -> list[Case]:
    """To fill pools: three of them do not fit into one worker at once."""
    params = generate_pb2.SamplingParams(max_tokens=10, ignore_eos=True)
    return [
        Case(f"big {placement}", tuple(tokens_of(tokenizer, 900, seed=100 + placement)), params, placement)
        for placement in (AUTO, LOCAL, SPLIT)
    ]


# One request, as its client saw it.


@dataclass(eq=False)
class Attempt:
    case: Case
    via: str
    router: int
    deadline_s: float
    started: float
    ended: float = 0.0
    outcome: str = ""  # complete, error, cancelled; empty: still running
    code: str = ""
    message: str = ""
    retry_after_ms: int = 0
    from_server: bool = False  # the error carries our own details: it is the router's word
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    route: Any = None
    finished: Any = None
    wrong_positions: int = 0
    excused_s: float = 0.0  # its router was stopped for so long

    def take(self, position: int, token_ids: Sequence[int], text: str) -> None:
        if token_ids and position != len(self.token_ids):
            self.wrong_positions += 1
        self.token_ids += token_ids
        self.arrivals += [time.monotonic()] * len(token_ids)
        self.text += text

    def end(self, outcome: str, code: str = "", message: str = "") -> None:
        self.ended, self.outcome, self.code, self.message = time.monotonic(), outcome, code, message

    def __str__(self) -> str:
        route = f"{self.route.decode_worker}<-{self.route.prefill_worker or '-'}" if self.route else "no route"
        seconds = (self.ended or time.monotonic()) - self.started
        return (
            f"{self.case.name} via {self.via} router-{self.router} {route}: {self.outcome or 'RUNNING'} {self.code} "
            f"{self.message[:300]!r} after {seconds:.2f} s of {self.deadline_s:g}, {len(self.token_ids)} tokens"
        )


class Ledger:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.attempts: list[Attempt] = []

    def open(self, case: Case, via: str, router: int, deadline_s: float) -> Attempt:
        attempt = Attempt(case, via, router, deadline_s, time.monotonic())
        with self._lock:
            self.attempts.append(attempt)
        return attempt

    def all(self) -> list[Attempt]:
        with self._lock:
            return list(self.attempts)

    def running(self) -> list[Attempt]:
        return [a for a in self.all() if not a.outcome]


def generate(
    cluster: ChaosCluster,
    ledger: Ledger,
    case: Case,
    router: int,
    deadline_s: float,
    salt: str,
    *,
    cancel_after_s: float | None = None,
    cancel_at_token: int | None = None,
) -> Attempt:
    """One Generate call, to its end, whatever that is."""
    attempt = ledger.open(case, "generate", router, deadline_s)
    stub = generate_pb2_grpc.GenerateServiceStub(cluster.channels[router])
    call: Any = stub.Generate(case.request(salt, deadline_s), timeout=deadline_s + 1.0)
    timer = None
    cancelled = False

    def cancel() -> None:
        nonlocal cancelled
        cancelled = True
        call.cancel()

    if cancel_after_s is not None:
        timer = threading.Timer(cancel_after_s, cancel)
        timer.start()
    try:
        for response in call:
            match response.WhichOneof("event"):
                case "started":
                    attempt.route = response.started.route
                case "tokens":
                    tokens = response.tokens
                    attempt.take(tokens.position, tokens.token_ids, tokens.text)
                    if cancel_at_token is not None and len(attempt.token_ids) >= cancel_at_token:
                        cancel()
                case "finished":
                    attempt.finished = response.finished
        if attempt.finished is not None:
            attempt.end("complete")
        else:
            attempt.end("error", "OK", "the stream ended without a last message")
    except grpc.RpcError as error:
        if attempt.finished is not None:
            attempt.end("complete")  # cancelled between the last message and the status
        elif cancelled and error.code() is grpc.StatusCode.CANCELLED:  # type: ignore[attr-defined]
            attempt.end("cancelled")
        else:
            attempt.end("error", error.code().name, error.details())  # type: ignore[attr-defined]
            _read_details(attempt, error)
    finally:
        if timer is not None:
            timer.cancel()
    return attempt


def _read_details(attempt: Attempt, error: Any) -> None:
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            attempt.from_server = info.domain == "diptych"
        elif detail.Unpack(retry):
            attempt.retry_after_ms = retry.retry_delay.ToMilliseconds()


class SessionClient(threading.Thread):
    """Keeps `width` requests live on one stream; opens another when the stream breaks."""

    def __init__(
        self,
        cluster: ChaosCluster,
        ledger: Ledger,
        router: int,
        width: int,
        pick: Callable[[], Case],
        deadline_s: float,
        rng: random.Random,
    ) -> None:
        super().__init__(daemon=True, name=f"session-{router}")
        self._cluster, self._ledger, self._router, self._width = cluster, ledger, router, width
        self._pick, self._deadline_s, self._rng = pick, deadline_s, rng
        self._handles = itertools.count(1)
        self._live: dict[int, Attempt] = {}
        self._asked: set[int] = set()
        self._out: queue.SimpleQueue[generate_pb2.SessionRequest | None] = queue.SimpleQueue()
        self._call: Any = None
        self.stopping = threading.Event()
        self._broken_off = False

    def cancel_some(self, share: float) -> None:
        """Cancel messages for a random share of what is live."""
        handles = [h for h in list(self._live) if self._rng.random() < share]
        self._asked |= set(handles)
        if handles:
            cancels = [generate_pb2.CancelRequest(handle=h) for h in handles]
            self._out.put(generate_pb2.SessionRequest(cancels=cancels))

    def break_off(self) -> None:
        """The client drops its stream, with everything on it."""
        self._broken_off = True
        if self._call is not None:
            self._call.cancel()

    def run(self) -> None:
        while not self.stopping.is_set():
            self._one_stream()
            self.stopping.wait(0.3)

    def _one_stream(self) -> None:
        self._out, self._live, self._broken_off = queue.SimpleQueue(), {}, False
        out = self._out
        stub = generate_pb2_grpc.GenerateServiceStub(self._cluster.channels[self._router])
        call = self._call = stub.Session(iter(out.get, None), timeout=3600)
        try:
            self._fill()
            for response in call:
                self._take(response)
                if self.stopping.is_set() and not self._live:
                    break
                self._fill()
            code, message = "OK", "the session's stream ended"
        except grpc.RpcError as error:
            code, message = error.code().name, error.details()  # type: ignore[attr-defined]
        out.put(None)
        call.cancel()
        for attempt in self._live.values():
            attempt.end("cancelled" if self._broken_off else "error", code, message)
        self._live = {}

    def stop_soon(self) -> None:
        self.stopping.set()
        if not self._live and self._call is not None:
            self._call.cancel()

    def _fill(self) -> None:
        starts = []
        while not self.stopping.is_set() and len(self._live) < self._width:
            case, handle = self._pick(), next(self._handles)
            self._live[handle] = self._ledger.open(case, "session", self._router, self._deadline_s)
            salt = f"{self._rng.getrandbits(64):x}"
            starts.append(generate_pb2.StartRequest(handle=handle, request=case.request(salt, self._deadline_s)))
        if starts:
            self._out.put(generate_pb2.SessionRequest(starts=starts))

    def _take(self, response: generate_pb2.SessionResponse) -> None:
        columns = (response.handles, response.positions, response.token_ids, response.texts)
        for handle, position, token, text in zip(*columns, strict=True):
            if handle in self._live:
                self._live[handle].take(position, (token,), text)
        refused = False
        for event in response.events:
            attempt = self._live.get(event.handle)
            if attempt is None:
                continue
            match event.WhichOneof("event"):
                case "started":
                    attempt.route = event.started.route
                case "tokens":
                    attempt.take(event.tokens.position, event.tokens.token_ids, event.tokens.text)
                case "finished":
                    attempt.finished = event.finished
                    cancelled = event.finished.reason == generate_pb2.FINISH_REASON_CANCELLED
                    if cancelled and event.handle not in self._asked:
                        attempt.end("error", "CANCELLED", "cancelled, and nobody asked for it")
                    else:
                        attempt.end("cancelled" if cancelled else "complete")
                    del self._live[event.handle]
                case "error":
                    attempt.from_server, attempt.retry_after_ms = True, event.error.retry_after_ms
                    attempt.end("error", code_pb2.Code.Name(event.error.code), event.error.message)
                    refused = True
                    del self._live[event.handle]
        if refused:
            time.sleep(0.2)  # as a client would that reads the retry hint


class Load:
    """Two kinds of clients on every router, until `stop`."""

    def __init__(
        self,
        cluster: ChaosCluster,
        ledger: Ledger,
        cases: Sequence[Case],
        seed: int,
        *,
        generate_clients: int = 1,
        session_width: int = 2,
        deadline_s: float = 30.0,
    ) -> None:
        self._cluster, self._ledger, self._cases, self._deadline_s = cluster, ledger, list(cases), deadline_s
        self._stopping = threading.Event()
        self.sessions = []
        self._threads: list[threading.Thread] = []
        for router in range(cluster.routers):
            for i in range(generate_clients):
                rng = random.Random(f"{seed}/generate/{router}/{i}")
                self._threads.append(threading.Thread(target=self._keep_asking, args=(router, rng), daemon=True))
            rng = random.Random(f"{seed}/session/{router}")
            session = SessionClient(
                cluster, ledger, router, session_width, lambda rng=rng: rng.choice(self._cases), deadline_s, rng
            )
            self.sessions.append(session)

    def start(self) -> Load:
        for thread in (*self._threads, *self.sessions):
            thread.start()
        return self

    def _keep_asking(self, router: int, rng: random.Random) -> None:
        while not self._stopping.is_set():
            case, salt = rng.choice(self._cases), f"{rng.getrandbits(64):x}"
            attempt = generate(self._cluster, self._ledger, case, router, self._deadline_s, salt)
            if attempt.outcome == "error":
                self._stopping.wait(0.2)

    def stop(self) -> list[str]:
        """What runs may end. Returns the names of clients that did not, within the deadline and a grace."""
        self._stopping.set()
        for session in self.sessions:
            session.stop_soon()
        deadline = time.monotonic() + self._deadline_s + 2 * GRACE_S
        for thread in (*self._threads, *self.sessions):
            thread.join(max(0.1, deadline - time.monotonic()))
        stuck = [t.name for t in (*self._threads, *self.sessions) if t.is_alive()]
        for session in self.sessions:
            session.break_off()
        return stuck


def record_answers(cluster: ChaosCluster, cases: Sequence[Case]) -> dict[str, Answer]:
    """From a cluster that nobody disturbs."""
    ledger = Ledger()
    threads = []

    def ask(mine: Sequence[Case], router: int) -> None:
        for case in mine:
            for _ in range(5):  # on a loaded machine a cold start can make one recover: asked again
                attempt = generate(cluster, ledger, case, router, 60.0, "undisturbed")
                if attempt.outcome != "complete" or not attempt.finished.recoveries:
                    break

    for i in range(4):
        threads.append(threading.Thread(target=ask, args=(cases[i::4], i % cluster.routers), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(180)
    answers = {}
    for attempt in ledger.all():
        assert attempt.outcome == "complete", f"undisturbed: {attempt}"
        if attempt.finished.recoveries:
            continue
        answers[attempt.case.name] = Answer(tuple(attempt.token_ids), attempt.text, attempt.finished.reason)
    assert answers.keys() == {c.name for c in cases}
    return answers


# Faults.


@dataclass(frozen=True)
class Fault:
    kind: str
    target: str = ""
    seconds: float = 0.0  # how long it is stopped, down, slow
    seed: int = 0

    def __str__(self) -> str:
        return " ".join(x for x in (self.kind, self.target, f"{self.seconds:g} s" if self.seconds else "") if x)


KINDS = (
    "kill decode", "kill prefill", "stop decode", "stop prefill", "kill router", "stop router", "fill pools",
    "clients leave", "short deadlines", "drain decode", "drain prefill", "drain router", "slow transport",
)  # fmt: skip


def plan(seed: int, cluster: ChaosCluster, kinds: Sequence[str] = KINDS) -> Iterator[Fault]:
    """Without end; every kind once before any comes again."""
    rng = random.Random(f"plan/{seed}")
    counts = {"decode": cluster.decode, "prefill": cluster.prefill, "router": cluster.routers}
    while True:
        for kind in rng.sample(kinds, len(kinds)):
            what = "decode" if kind == "slow transport" else kind.split()[-1]
            target = f"{what}-{rng.randrange(counts[what])}" if what in counts else ""
            longest = {"kill": 1.0, "stop": 6.0, "slow": 4.0}.get(kind.split()[0], 0.0)
            seconds = round(rng.uniform(0.2, longest), 2) if longest else 0.0
            yield Fault(kind, target, seconds, rng.getrandbits(32))


@dataclass(eq=False)
class Injected:
    fault: Fault
    at: float
    gone_at: float = 0.0  # when the target stopped serving
    whole_at: float = 0.0  # when the cluster was whole again


class Driver:
    """One fault at a time; the cluster is whole, and has run for a moment, before the next."""

    def __init__(
        self,
        cluster: ChaosCluster,
        ledger: Ledger,
        load: Load,
        cases: Sequence[Case],
        big_cases: Sequence[Case],
        settle_s: float = 1.5,
    ) -> None:
        self.cluster, self.ledger, self.load = cluster, ledger, load
        self.cases, self.big_cases, self.settle_s = list(cases), list(big_cases), settle_s
        self.injected: list[Injected] = []
        self._side: list[threading.Thread] = []

    def run(self, faults: Iterator[Fault], duration_s: float, say: Callable[[str], None]) -> None:
        end = time.monotonic() + duration_s
        self._settle()
        while time.monotonic() < end:
            fault = next(faults)
            begun = time.monotonic()
            self.inject(fault)
            say(f"{fault}: whole again after {time.monotonic() - begun:.1f} s")
            self._settle()

    def inject(self, fault: Fault) -> Injected:
        record = Injected(fault, time.monotonic())
        self.injected.append(record)
        verb, name = fault.kind.split()[0], fault.target
        match verb:
            case "kill":
                record.at = time.monotonic()
                self.cluster.kill(name)
                time.sleep(fault.seconds)
                self._back(name)
            case "stop":
                self._stop(record, name, fault.seconds)
            case "drain":
                self.cluster.drain(name, 45.0)
                self._back(name)
            case "slow":
                self.cluster.drain(name, 45.0)
                self._back(name, slow_bytes_per_s=8e6)
                time.sleep(fault.seconds)
                self.cluster.drain(name, 45.0)
                self._back(name)
            case "fill":
                self._burst(fault, self.big_cases, 6, 30.0)
            case "short":
                self._burst(fault, self.cases, 8, None)
            case "clients":
                self._clients_leave(fault)
            case _:
                raise ValueError(fault.kind)
        record.whole_at = time.monotonic()
        return record

    def _back(self, name: str, **transport: Any) -> None:
        since = time.time_ns()
        self.cluster.start_again(name, **transport)
        self.cluster.wait_whole(90.0, {name: since} if not name.startswith("router") else None)

    def _stop(self, record: Injected, name: str, seconds: float) -> None:
        record.at = time.monotonic()
        self.cluster.freeze(name)
        time.sleep(seconds)
        self.cluster.thaw(name)
        if name.startswith("router"):
            for attempt in self.ledger.running():
                if f"router-{attempt.router}" == name:
                    attempt.excused_s += seconds
        self.cluster.wait_whole(60.0)

    def _burst(self, fault: Fault, cases: Sequence[Case], count: int, deadline_s: float | None) -> None:
        """Requests besides the load; without a deadline given, each gets a short one."""
        rng = random.Random(fault.seed)
        threads = []
        for _ in range(count):
            router, case = rng.randrange(self.cluster.routers), rng.choice(cases)
            seconds = deadline_s or round(rng.uniform(0.02, 1.5), 3)
            salt = f"{rng.getrandbits(64):x}"
            arguments = (self.cluster, self.ledger, case, router, seconds, salt)
            threads.append(threading.Thread(target=generate, args=arguments, daemon=True))
            threads[-1].start()
        self._join(threads, (deadline_s or 1.5) + 2 * GRACE_S)

    def _clients_leave(self, fault: Fault) -> None:
        rng = random.Random(fault.seed)
        threads = []
        for _ in range(8):
            how = {"cancel_after_s": rng.uniform(0, 2)} if rng.random() < 0.5 else {"cancel_at_token": rng.randrange(9)}
            case, router, salt = rng.choice(self.cases), rng.randrange(self.cluster.routers), f"{rng.random()}"
            arguments = (self.cluster, self.ledger, case, router, 30.0, salt)
            threads.append(threading.Thread(target=generate, args=arguments, kwargs=how, daemon=True))
            threads[-1].start()
        for session in self.load.sessions:
            session.cancel_some(0.5)
        self._join(threads, 30.0 + 2 * GRACE_S)
        rng.choice(self.load.sessions).break_off()

    @staticmethod
    def _join(threads: Sequence[threading.Thread], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.01, deadline - time.monotonic()))

    def _settle(self) -> None:
        time.sleep(self.settle_s)


# Judgement.


@dataclass
class Verdict:
    wrong: list[str] = field(default_factory=list)  # tokens, text or end differ from the undisturbed answer
    positions: list[str] = field(default_factory=list)  # duplicates and gaps
    late: list[str] = field(default_factory=list)  # ended after deadline and grace, or never
    dishonest: list[str] = field(default_factory=list)  # no message, an unexpected code, no retry hint
    rows: list[tuple[object, ...]] = field(default_factory=list)
    recovery_ms: dict[str, list[float]] = field(default_factory=dict)
    complete: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def problems(self) -> list[str]:
        kinds = {"WRONG": self.wrong, "POSITIONS": self.positions, "LATE": self.late, "DISHONEST": self.dishonest}
        return [f"{kind} {line}" for kind, lines in kinds.items() for line in lines]


HEADER = (
    "fault", "injected", "complete", "moved", "errors", "cancelled", "wrong", "dup/gap", "late",
    "recovery p50 ms", "p99 ms",
)  # fmt: skip


def judge(attempts: Sequence[Attempt], injected: Sequence[Injected], answers: Mapping[str, Answer]) -> Verdict:
    verdict = Verdict()
    by_kind: dict[str, list[Attempt]] = {"(none yet)": []} | {i.fault.kind: [] for i in injected}
    for attempt in attempts:
        last = max(
            (i for i in injected if i.at <= (attempt.ended or time.monotonic())), key=lambda i: i.at, default=None
        )
        by_kind[last.fault.kind if last else "(none yet)"].append(attempt)
        _judge_one(attempt, answers[attempt.case.name], verdict, f"[{last.fault if last else 'no fault'}] {attempt}")
    for one in injected:
        verdict.recovery_ms.setdefault(one.fault.kind, []).extend(recovery_ms(attempts, one.fault.target, one.at))
    for kind, mine in by_kind.items():
        marks = [len([1 for line in lines if _of_kind(line, kind)]) for lines in
                 (verdict.wrong, verdict.positions, verdict.late)]  # fmt: skip
        times = sorted(verdict.recovery_ms.get(kind, []))
        verdict.rows.append(
            (
                kind,
                sum(i.fault.kind == kind for i in injected),
                sum(a.outcome == "complete" for a in mine),
                sum(bool(a.finished and a.finished.recoveries) for a in mine),
                sum(a.outcome == "error" for a in mine),
                sum(a.outcome == "cancelled" for a in mine),
                *marks,
                f"{percentile(times, 50):.0f}" if times else "",
                f"{percentile(times, 99):.0f}" if times else "",
            )
        )
    return verdict


def _of_kind(line: str, kind: str) -> bool:
    return line.startswith(f"[{kind if kind != '(none yet)' else 'no fault'}")


def _judge_one(attempt: Attempt, answer: Answer, verdict: Verdict, line: str) -> None:
    got = tuple(attempt.token_ids)
    if attempt.outcome == "complete":
        verdict.complete += 1
        if got != answer.token_ids or attempt.text != answer.text or attempt.finished.reason != answer.reason:
            verdict.wrong.append(f"{line}\n   got      {got}\n   expected {answer.token_ids}")
    elif got != answer.token_ids[: len(got)]:
        verdict.wrong.append(f"{line}\n   got      {got}\n   expected {answer.token_ids}")
    if attempt.wrong_positions:
        verdict.positions.append(line)
    end = attempt.ended or time.monotonic()
    if not attempt.outcome or end - attempt.started > attempt.deadline_s + GRACE_S + attempt.excused_s:
        verdict.late.append(line)
    if attempt.outcome == "error":
        verdict.errors[attempt.code] = verdict.errors.get(attempt.code, 0) + 1
        hinted = not attempt.from_server or attempt.code not in RETRYABLE or attempt.retry_after_ms > 0
        # A router that has just started may not know the prefill workers yet: an answer to who insists on them.
        insisted = attempt.code == "FAILED_PRECONDITION" and attempt.case.placement == SPLIT
        if not (attempt.code in HONEST_CODES or insisted) or not attempt.message or not hinted:
            verdict.dishonest.append(f"{line} (retry after {attempt.retry_after_ms} ms)")


def recovery_ms(attempts: Sequence[Attempt], worker: str, at: float) -> list[float]:
    """Fault to the next token, of every request that was on the worker then and went on elsewhere."""
    times = []
    for attempt in attempts:
        on_it = attempt.route is not None and worker in (attempt.route.decode_worker, attempt.route.prefill_worker)
        if not (on_it and attempt.finished is not None and attempt.finished.recoveries):
            continue
        after = [t for t in attempt.arrivals if t > at]
        if attempt.started <= at < attempt.ended and after:
            times.append((after[0] - at) * 1e3)
    return times


def percentile(values: Sequence[float], percent: float) -> float:
    """Of sorted values; the nearest rank."""
    if not values:
        return float("nan")
    return values[min(len(values) - 1, max(0, -(-int(percent * len(values)) // 100) - 1))]
