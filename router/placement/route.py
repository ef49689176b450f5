"""What a decision is asked, and what it answers: facts and parameters in, a Route or a Rejection out."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from router.errors import Failure
from router.placement.view import WorkerKey


class Placement(enum.Enum):
    AUTO = "auto"
    LOCAL = "local"
    SPLIT = "split"


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """`cached_tokens`: by worker, the prompt tokens that its prefix cache is believed to hold (advisory).

    `time_left_s` to the deadline and `expected_tokens` of the answer decide on admission; recoveries are `admitted`.
    `affine`: workers that served the same session last.
    """

    prompt_tokens: int
    max_tokens: int
    placement: Placement = Placement.AUTO
    cached_tokens: Mapping[WorkerKey, int] = field(default_factory=dict)
    exclude: frozenset[WorkerKey] = frozenset()
    priority: int = 0
    time_left_s: float = math.inf
    expected_tokens: int = 0
    admitted: bool = False
    affine: tuple[WorkerKey, ...] = ()
    load_ms: Callable[[WorkerKey], float] | None = None  # of its adapter, where that has no slot; None: it has none
    waited_ms: float = 0.0  # since it arrived
    lot: float = 1.0  # router/placement/lots.py


@dataclass(frozen=True, slots=True)
class PolicyParams:
    """`ttft_target_ms` + `ttft_target_stretch` x the prompt's own time: when the first token is due."""

    itl_target_ms: float = 100.0
    max_local_stall_steps: float = 2.0
    max_backlog_s: float = math.inf
    ttft_target_ms: float = 1000.0
    ttft_target_stretch: float = 2.0
    headroom: float = 0.15
    hysteresis: float = 0.05
    pull_prefixes: bool = False
    newcomers: bool = True  # what a prompt costs those who come after it is weighed
    due_dates: bool = True  # workers are told when first tokens are due, and put some prompts back under overload
    overload_protect: float = 0.0  # 0: the longest ones; 1: drawn by lot; between: both count

    @property
    def max_local_stall_ms(self) -> float:
        return self.itl_target_ms * self.max_local_stall_steps


class PrefixPull(NamedTuple):
    """Tokens of the prompt whose KV the computing worker pulls from `holder` instead of computing it.

    `wait_ms`: after this the prefix had better be computed (what pulling was to save).
    """

    holder: WorkerKey
    tokens: int
    wait_ms: float


class Alternative(NamedTuple):
    """What else was weighed. `cost_ms` compares with the route's own cost."""

    placement: Placement
    decode: WorkerKey
    prefill: WorkerKey | None
    ttft_ms: float
    cost_ms: float


class Chosen(Protocol):
    """The option that was taken (an Option of estimates.py)."""

    @property
    def local_cost_ms(self) -> float: ...

    @property
    def split_cost_ms(self) -> float: ...

    @property
    def step_cost_ms(self) -> float: ...


class Considered(Protocol):
    """All that was weighed for a request (the Weighed of estimates.py)."""

    def alternatives(self, chosen: Any, *, split: bool) -> tuple[Alternative, ...]: ...


@dataclass(frozen=True, slots=True)
class Route:
    """`estimates` are what the rule saw, by name with unit."""

    decode: WorkerKey
    prefill: WorkerKey | None
    rule: str
    estimates: Mapping[str, float]
    pull: PrefixPull | None = None
    _chosen: Chosen | None = field(default=None, repr=False, compare=False)
    _weighed: Considered | None = field(default=None, repr=False, compare=False)

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """What else was weighed; put into words only when somebody asks."""
        if self._chosen is None or self._weighed is None:
            return ()
        return self._weighed.alternatives(self._chosen, split=self.split)

    @property
    def cost_ms(self) -> float:
        """By its own estimates; compares with that of the alternatives."""
        o = self._chosen
        return 0.0 if o is None else (o.split_cost_ms if self.split else o.local_cost_ms) + o.step_cost_ms

    @property
    def split(self) -> bool:
        return self.prefill is not None

    @property
    def computing(self) -> WorkerKey:
        """The worker that computes the prompt."""
        return self.prefill or self.decode


@dataclass(frozen=True, slots=True)
class Rejection:
    failure: Failure
