"""Who decides the size of simulated pools: the product's policy, and what it is compared with.

All of them see the same observation and route with the same decide(); only the counts differ. The others are
re-implemented here from their published descriptions, with the simulator's own cost model as their profile, and given
what they need to do well: it is their rule that is compared.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from scaling.config import ScalingConfig
from scaling.decision import Decision
from scaling.demand import Load
from scaling.observation import Observation, Pool, Stage, WorkerSeen
from scaling.policy import decide
from scaling.state import ScalingState
from scaling.weighing import Bounds, Pair, Terms, balanced, smallest
from simulator.cost_model import CostModel
from simulator.spec import ClusterSpec
from simulator.traces import Trace

_POOL_SHARE = 0.92


def _told(seen: Observation, pair: Pair, rule: str, shifted: int = 0) -> Decision:
    return Decision(seen.now, *pair, standbys=0, rule=rule, why="", shifted=shifted)


def _asked(seen: Observation) -> Pair:
    assert seen.prefill_target is not None
    assert seen.decode_target is not None
    return seen.prefill_target, seen.decode_target


def _towards(seen: Observation, pair: Pair, rule: str) -> Decision:
    """What one role loses and the other gains changes its role; the rest starts or stops."""
    base = _asked(seen)
    gained = pair[0] - base[0], pair[1] - base[1]
    shifted = min(abs(gained[0]), abs(gained[1])) if gained[0] * gained[1] < 0 else 0
    ready = seen.count(Pool.DECODE if gained[0] > 0 else Pool.PREFILL, Stage.READY)
    return _told(seen, pair, rule, shifted=min(shifted, ready) * (1 if gained[0] > 0 else -1))


class Ours:
    """scaling.policy.decide, as the live cluster runs it."""

    def __init__(self, config: ScalingConfig, terms: Terms, name: str = "diptych") -> None:
        self.name, self.config, self.terms = name, config, terms
        self.state = ScalingState()

    def decide(self, seen: Observation) -> Decision:
        decision, self.state = decide(seen, self.state, self.config, self.terms)
        return decision


@dataclass(frozen=True, slots=True)
class Fixed:
    """Nothing changes."""

    pair: Pair
    name: str = "fixed"

    def decide(self, seen: Observation) -> Decision:
        return _told(seen, self.pair, "fixed")


@dataclass(frozen=True, slots=True)
class Profile:
    """What a worker can do, known exactly: of the cost model, for requests of these lengths."""

    prefill_tokens_per_s: float
    step_ms: float
    sequences: float  # of one decode worker, within memory and `share` of the ITL target

    @classmethod
    def of(
        cls, costs: CostModel, spec: ClusterSpec, prompt_tokens: float, answer_tokens: float, share: float = 1.0
    ) -> Profile:
        step, chunk = costs.step, spec.prefill.max_batch_tokens
        prompt = max(1, round(prompt_tokens))
        context = prompt_tokens + answer_tokens / 2
        each = step.per_sequence_ms + step.per_context_token_ms * context
        constant = step.constant_ms + step.floor_ms
        capacity = (spec.kv_capacity_tokens or costs.kv_capacity_tokens) * _POOL_SHARE
        n = max(1.0, min((spec.itl_target_ms * share - constant) / each, capacity / context, 256.0))
        return cls(prompt / step.prompt_ms(prompt, chunk) * 1e3, constant + n * each, n)

    @property
    def decode_tokens_per_s(self) -> float:
        return self.sequences / self.step_ms * 1e3


class ServeCounts:
    """Ray Serve's request-count autoscaling, one policy for each pool: ongoing requests over a target, averaged over
    30 s; more after 30 s of wanting more, fewer after 600 s of wanting fewer (its defaults)."""

    def __init__(
        self, target_prefill: float, target_decode: float, budget: int, up_s: float = 30.0, down_s: float = 600.0
    ) -> None:
        self.name = f"serve {target_prefill:g}/{target_decode:g}, down {down_s:g} s"
        self._targets, self._budget, self._up_s, self._down_s = (target_prefill, target_decode), budget, up_s, down_s
        self._ongoing: tuple[deque[tuple[float, float]], ...] = deque(), deque()
        self._since: list[tuple[int, float] | None] = [None, None]

    def decide(self, seen: Observation) -> Decision:
        pair = list(_asked(seen))
        for i, pool in enumerate((Pool.PREFILL, Pool.DECODE)):
            workers = seen.of(pool, Stage.READY)
            ongoing = float(sum(w.running_sequences for w in workers))
            if pool is Pool.PREFILL:  # what waits there runs nowhere yet
                ongoing = sum(max(w.running_sequences, math.ceil(w.backlog_tokens / 4096)) for w in workers)
            line = self._ongoing[i]
            line.append((seen.now, ongoing))
            while line[0][0] < seen.now - 30.0:
                line.popleft()
            mean = sum(v for _, v in line) / len(line)
            wanted = min(self._budget - 1, max(1, math.ceil(mean / self._targets[i])))
            pair[i] = self._after_delay(i, wanted, pair[i], seen.now)
        return _told(seen, (pair[0], pair[1]), "count")

    def _after_delay(self, i: int, wanted: int, count: int, now: float) -> int:
        direction = (wanted > count) - (wanted < count)
        since = self._since[i]
        if direction == 0:
            self._since[i] = None
            return count
        if since is None or since[0] != direction:
            since = self._since[i] = direction, now
        if now - since[1] >= (self._up_s if direction > 0 else self._down_s):
            self._since[i] = None
            return wanted
        return count


class ThroughputPlanner:
    """As Dynamo's planner is described: every 180 s a floor, what the mean load of the last window needs by the
    profile; every 5 s one worker more where the estimated latency is above its target, one fewer where it would stay
    below 80 % of it. Its estimates know the steps, not the queues; `queues` gives it those too."""

    def __init__(
        self, costs: CostModel, spec: ClusterSpec, budget: int, *, window_s: float = 180.0, queues: bool = False
    ) -> None:
        self.name = "planner 180 s / 5 s" + (", sees queues" if queues else "")
        self._costs, self._spec, self._budget, self._window_s, self._queues = costs, spec, budget, window_s, queues
        self._window: list[Observation] = []
        self._planned_at = 0.0
        self._floor: Pair = (1, 1)
        self._answer = 0.0
        self._prompt = 1.0

    def decide(self, seen: Observation) -> Decision:
        self._window.append(seen)
        if seen.now - self._planned_at >= self._window_s or not self._planned_at:
            self._plan(seen)
        prefill, decode = _asked(seen)
        pending = [w for w in seen.workers if w.stage in (Stage.STARTING, Stage.UNSCHEDULABLE)]
        waits = {w.pool for w in pending}
        share_p, share_d = self._estimates(seen)
        prefill = self._step(prefill, self._floor[0], share_p, Pool.PREFILL in waits)
        decode = self._step(decode, self._floor[1], share_d, Pool.DECODE in waits)
        return _told(seen, self._clamped(prefill, decode), "planner")

    def _step(self, count: int, floor: int, share: float, waits: bool) -> int:
        if count < floor:
            return floor
        if share > 1.0 and not waits:
            return count + 1
        if count > floor and share * count / (count - 1) < 0.8:
            return count - 1
        return count

    def _plan(self, seen: Observation) -> None:
        covered = sum(o.covers_s for o in self._window)
        arrived = sum(o.arrived_requests for o in self._window)
        ended = sum(o.ended_requests for o in self._window)
        self._answer = sum(o.ended_answer_tokens for o in self._window) / ended if ended else self._answer
        if not arrived or not self._answer:
            return
        self._planned_at = seen.now
        self._prompt = sum(o.arrived_prompt_tokens for o in self._window) / arrived
        uncached = sum(o.arrived_uncached_tokens for o in self._window) / covered
        profile = Profile.of(self._costs, self._spec, self._prompt, self._answer)
        self._floor = (
            max(1, math.ceil(uncached / profile.prefill_tokens_per_s)),
            max(1, math.ceil(arrived / covered * self._answer / profile.decode_tokens_per_s)),
        )
        self._window = []

    def _estimates(self, seen: Observation) -> tuple[float, float]:
        """Shares of the targets: time to the first token, time between tokens."""
        spec, step = self._spec, self._costs.step
        own_s = step.prompt_ms(max(1, round(self._prompt)), spec.prefill.max_batch_tokens) / 1e3
        prefills, decodes = seen.of(Pool.PREFILL, Stage.READY), seen.of(Pool.DECODE, Stage.READY)
        waits_s = 0.0
        if self._queues and prefills:
            rate = max(1.0, sum(w.prefill_tokens_per_s for w in prefills))
            waits_s = sum(w.backlog_tokens for w in prefills) / rate
        ttft = (own_s + waits_s) / (spec.ttft_base_s + spec.ttft_isolated_factor * own_s)
        n, kv = sum(w.running_sequences for w in decodes), sum(w.kv_tokens for w in decodes)
        each = max(1, len(decodes))
        itl = step.decode_ms(round(n / each), kv / each) / spec.itl_target_ms
        return ttft, itl

    def _clamped(self, prefill: int, decode: int) -> Pair:
        """In proportion, as its budget clamp does."""
        total = prefill + decode
        if total > self._budget:
            prefill = max(1, min(self._budget - 1, prefill * self._budget // total))
            decode = self._budget - prefill
        return prefill, decode


class Thresholds:
    """As Llumnix's are described: a role grows when its load passes a ceiling (0.7 of KV; 0.95 of the target for
    predicted latencies) and shrinks below a floor (0.6 of that); it takes from the other role first if that one is
    below its floor. One change at a time."""

    def __init__(self, costs: CostModel, spec: ClusterSpec, budget: int, calm_s: float = 30.0) -> None:
        self.name = "thresholds"
        self._costs, self._spec, self._budget, self._calm_s = costs, spec, budget, calm_s
        self._last_down = 0.0

    def decide(self, seen: Observation) -> Decision:
        pair = _asked(seen)
        spec = self._spec
        prefills, decodes = seen.of(Pool.PREFILL, Stage.READY), seen.of(Pool.DECODE, Stage.READY)
        rate = sum(w.prefill_tokens_per_s for w in prefills)
        wait_s = sum(w.backlog_tokens for w in prefills) / rate if rate else 0.0
        load_p = wait_s / spec.ttft_base_s / 0.95
        load_d = self._decode_load(decodes)
        if any(w.stage in (Stage.STARTING, Stage.UNSCHEDULABLE) for w in seen.workers) or not prefills or not decodes:
            return _told(seen, pair, "waits")
        for load, other, pool in ((load_p, load_d, Pool.PREFILL), (load_d, load_p, Pool.DECODE)):
            if load <= 1.0:
                continue
            i = 0 if pool is Pool.PREFILL else 1
            if other < 0.6 and pair[1 - i] > 1:
                k = 1 if pool is Pool.PREFILL else -1
                return _told(seen, (pair[0] + k, pair[1] - k), "shift", shifted=k)
            if sum(pair) < self._budget:
                return _told(seen, (pair[0] + (i == 0), pair[1] + (i == 1)), "out")
        if seen.now - self._last_down >= self._calm_s:
            for i, load in enumerate((load_p, load_d)):
                n = pair[i]
                if n > 1 and load < 0.6 and load * n / (n - 1) < 1.0:
                    self._last_down = seen.now
                    return _told(seen, (pair[0] - (i == 0), pair[1] - (i == 1)), "in")
        return _told(seen, pair, "steady")

    def _decode_load(self, decodes: Sequence[WorkerSeen]) -> float:
        if not decodes:
            return math.inf
        kv = sum(w.kv_tokens for w in decodes) / max(1, sum(w.kv_capacity_tokens for w in decodes))
        n = sum(w.running_sequences for w in decodes) / len(decodes)
        each = sum(w.kv_tokens for w in decodes) / len(decodes)
        tpot = self._costs.step.decode_ms(round(n), each) / self._spec.itl_target_ms
        return max(kv / 0.7, tpot / 0.95)


class Clairvoyant:
    """Knows the trace: at every moment the smallest pools that carry what will come until a start would be over, by
    the exact cost of each request, and `spare` deviations more."""

    def __init__(
        self, trace: Trace, costs: CostModel, spec: ClusterSpec, budget: int, start_s: float, spare: float
    ) -> None:
        self.name, self._start_s = f"clairvoyant {spare:g}", start_s
        self._limits = Bounds((1, budget), (1, budget), float(budget), Terms(spec.itl_target_ms))
        n = int(trace.requests[-1].arrival_s) + 1
        step, chunk = costs.step, spec.prefill.max_batch_tokens
        full = (spec.kv_capacity_tokens or costs.kv_capacity_tokens) * _POOL_SHARE
        step_ms = 0.8 * spec.itl_target_ms - step.constant_ms - step.floor_ms  # for what grows with the sequences
        work = [0.0] * (n + 1)
        resident = [[0.0] * (n + 2) for _ in range(3)]  # shares of a decode worker: step, memory, sequences
        for r in trace.requests:
            at = int(r.arrival_s)
            work[at] += step.prompt_ms(r.prompt_tokens, chunk) / 1e3
            context = r.prompt_tokens + r.output_tokens / 2
            each_ms = step.per_sequence_ms + step.per_context_token_ms * context
            shares = each_ms / step_ms, context / full, 1 / spec.decode.max_running_sequences
            end = min(n + 1, at + max(1, math.ceil(r.output_tokens * spec.itl_target_ms * 0.7 / 1e3)))
            for series, share in zip(resident, shares, strict=True):
                series[at] += share
                series[end] -= share
        own_s = sum(work) / len(trace.requests)
        self._loads: list[Load] = []
        now = [0.0, 0.0, 0.0]
        for second in range(n):
            now = [a + series[second] for a, series in zip(now, resident, strict=True)]
            window = work[max(0, second - 10) : second + 11]
            prefill, decode = sum(window) / len(window), max(now)
            self._loads.append(
                Load(prefill, decode, spare * math.sqrt(prefill * own_s / (1 + own_s)), spare * 0.1 * math.sqrt(decode))
            )

    def decide(self, seen: Observation) -> Decision:
        start = int(seen.now)
        coming = self._loads[start : start + math.ceil(self._start_s) + 8 : 3] or self._loads[-1:]
        base, limits = _asked(seen), self._limits
        total = 2
        for load in coming:  # roles shift at once: only the sum has to be there in time
            enough = smallest([load], limits, base, total, limits.most, 1.0)
            total = limits.most if enough is None else sum(enough)
        found = balanced(coming[:3], list(limits.pairs(total)), base)
        assert found is not None
        return _towards(seen, found[1], "foreseen")


class Scheduled:
    """A plan that was made before: each pair from its time on."""

    def __init__(self, name: str, plan: Sequence[tuple[float, Pair]]) -> None:
        self.name, self._plan = name, list(plan)

    def decide(self, seen: Observation) -> Decision:
        pair = _asked(seen)
        for at, planned in self._plan:
            if at > seen.now:
                break
            pair = planned
        return _towards(seen, pair, "planned")
