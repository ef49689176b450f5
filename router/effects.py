"""What a request's life asks of workers and of the policy. Each call returns at once."""

from __future__ import annotations

from typing import Any, Protocol

from router.errors import Failure
from router.placement.policy import Rejection, Route, WorkerKey
from router.request import Finish, LegStart, Request


class Workers(Protocol):
    """Effects towards workers; each returns at once."""

    def start(self, worker: WorkerKey, start: LegStart, prefill_tokens: int) -> None: ...

    def cancel(self, worker: WorkerKey, leg: int, reason: str, keep_lease: bool = False) -> None: ...

    def continue_locally(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...]) -> None: ...

    def follow(self, worker: WorkerKey, leg: int, emitted: tuple[int, ...], pull: tuple[str, WorkerKey]) -> None: ...

    def serve(self, worker: WorkerKey, leg: int, handoff_id: str, most_tokens: int) -> None:
        """What runs there will go on elsewhere."""
        ...

    def freeze(self, worker: WorkerKey, leg: int, handoff_id: str) -> None:
        """Now."""
        ...

    def keep(self, worker: WorkerKey, leg: int, handoff_id: str) -> None:
        """It will not."""
        ...

    def computed(self, worker: WorkerKey, leg: int) -> None: ...

    def ended(self, worker: WorkerKey, leg: int) -> None: ...

    def retry_later(self, key: str, delay_s: float) -> None: ...


class Planner(Protocol):
    """Questions of a life in trouble."""

    def place(self, request: Request, num_emitted: int, exclude: frozenset[WorkerKey]) -> Route | Rejection:
        """The whole request anew."""
        ...

    def unlike(self, layout: str) -> frozenset[WorkerKey]:
        """Workers of another scheme, where several serve; else nobody."""
        ...

    def another_source(
        self, request: Request, num_emitted: int, decode: WorkerKey, kept_tokens: int, exclude: frozenset[WorkerKey]
    ) -> Route | None:
        """Another prefill worker for a decode worker that waits. None: decode should compute."""
        ...

    def another_reader(self, request: Request, source: WorkerKey, exclude: frozenset[WorkerKey]) -> WorkerKey | None:
        """Another decode worker for KV that stands under a lease."""
        ...

    def may_retry(self, now: float) -> bool:
        """Whether the budget that all requests share has something left."""
        ...

    def retried(self, now: float) -> None:
        """Spend from it."""
        ...

    def backoff_s(self, waits: int) -> float:
        """How long to wait for a worker, with jitter."""
        ...


class Client(Protocol):
    """Effects towards the client; buffers, never waits. `life`: a Life, which stands below."""

    def started(self, life: Any) -> None: ...

    def token(self, position: int, token_id: int, text: str, logprobs: object | None) -> None: ...

    def finished(self, life: Any, reason: Finish) -> None: ...

    def failed(self, life: Any, failure: Failure) -> None: ...
