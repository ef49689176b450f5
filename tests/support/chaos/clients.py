"""Clients that ask through Generate and Session, and what each request saw."""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from diptych.v1 import generate_pb2, generate_pb2_grpc
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from tests.support.chaos.cases import Answer, Case
from tests.support.chaos.cluster import ChaosCluster

GRACE_S = 4.0  # after its deadline a request may still take so long to end: shared machines stall


@dataclass(eq=False)
class Attempt:
    case: Case
    via: str
    router: int
    deadline_s: float
    started: float
    request_id: str = ""
    ended: float = 0.0
    outcome: str = ""  # complete, error, cancelled; empty: still running
    code: str = ""
    message: str = ""
    retry_after_ms: int = 0
    from_server: bool = False  # the error carries our own details: it is the router's word
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    logprobs: int = 0  # of so many tokens
    route: Any = None
    finished: Any = None
    wrong_positions: int = 0
    excused_s: float = 0.0  # its router was stopped for so long

    def began(self, started: Any) -> None:
        self.route, self.request_id = started.route, started.request_id

    def take(self, position: int, token_ids: Sequence[int], text: str, logprobs: int = 0) -> None:
        if token_ids and position != len(self.token_ids):
            self.wrong_positions += 1
        self.token_ids += token_ids
        self.arrivals += [time.monotonic()] * len(token_ids)
        self.text += text
        self.logprobs += logprobs

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
                    attempt.began(response.started)
                case "tokens":
                    tokens = response.tokens
                    attempt.take(tokens.position, tokens.token_ids, tokens.text, len(tokens.logprobs))
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
                    attempt.began(event.started)
                case "tokens":
                    tokens = event.tokens
                    attempt.take(tokens.position, tokens.token_ids, tokens.text, len(tokens.logprobs))
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
