"""The work that comes, in workers: of prompts and of answers, now and after a given time. Pure.

Prompts: uncached tokens a second, over what a worker computes a second, plus what of the backlog would still be there.
Answers: sequences that will be resident, over what a worker can hold while a step stays within the ITL target.

    resident sequences = requests a second x answer tokens x step time / tokens per step     (Little's law)

The KV that is resident already counts when it is more: answers that run may be longer than those that ended. Queues
count in both. Random arrivals scatter: a load of x workers made of pieces of g worker-seconds has a deviation of
sqrt(x g), and `margin` of them are kept spare. Many small requests need little spare, few large ones need much.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scaling.config import ScalingConfig
from scaling.observation import Observation, Pool, Stage, WorkerSeen

DRAIN_S = 15.0  # a backlog should be gone within so long, or as long again as a remedy takes
_RECENT_S = 15.0
_LEAST_ENDED = 8  # answers, before their mean length counts
_POOL_SHARE = 0.92  # of a worker's KV memory that running contexts may fill: answers grow
_SHAPE = 2.0  # of prompt lengths: their second moment over their mean squared, as if exponential
# Of the free time of decode workers, what prompts can use that run there between decodes.
SOAKED_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Sample:
    """Of one interval."""

    at: float
    covers_s: float
    requests: int
    prompt_tokens: int
    uncached_tokens: int
    kv_tokens: int
    ended: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of one worker in either role; as measured by workers that are past their warm-up."""

    prefill_tokens_per_s: float = 0.0
    kv_tokens: float = 0.0  # resident, within memory and the ITL target
    sequences: float = 0.0  # whose contexts these are
    step_ms: float = 0.0  # with so many
    tokens_per_step: float = 1.0
    answer_tokens: float = 0.0

    @property
    def known(self) -> bool:
        return self.prefill_tokens_per_s > 0 and self.kv_tokens > 0


@dataclass(frozen=True, slots=True)
class Trend:
    """Of a series: where it stands, and how fast it moves. `slope` is 0 unless it rose, or fell, throughout."""

    level: float = 0.0
    slope: float = 0.0
    recent: float = 0.0

    def highest(self, within_s: float) -> float:
        """The most that is expected between now and then."""
        return max(0.0, self.level, self.recent, self.level + self.slope * within_s)


@dataclass(frozen=True, slots=True)
class Load:
    """In workers. `spare_*`: for chance."""

    prefill: float
    decode: float
    spare_prefill: float
    spare_decode: float


@dataclass(frozen=True, slots=True)
class Demand:
    """All that a load is made of."""

    capacity: Capacity
    uncached_per_s: Trend
    requests_per_s: Trend
    kv_tokens: Trend
    prompt_tokens: float  # of a mean request
    uncached_tokens: float
    backlog_tokens: float  # that more workers would shorten

    def load(self, within_s: float, pair: tuple[int, int], config: ScalingConfig) -> Load:
        """The most that is expected within so long, while this pair of counts is at work."""
        c = self.capacity
        rate = c.prefill_tokens_per_s
        coming = self._answers(self.requests_per_s.highest(within_s))
        decode = max(coming, self.kv_tokens.highest(within_s) / c.kv_tokens)
        spare_decode = self._spare_decode(decode, config)
        free = max(0.0, pair[1] - decode - spare_decode) * SOAKED_SHARE
        coming = self.uncached_per_s.highest(within_s)
        left = max(0.0, self.backlog_tokens + (coming - (pair[0] + free) * rate) * within_s)
        prefill = (coming + left / max(DRAIN_S, within_s)) / rate
        return Load(prefill, decode, self._spare_prefill(prefill, config), spare_decode)

    def arriving(self, config: ScalingConfig) -> Load:
        """Of what comes just now, without what has piled up."""
        prefill = self.uncached_per_s.highest(0.0) / self.capacity.prefill_tokens_per_s
        decode = self._answers(self.requests_per_s.highest(0.0))
        return Load(prefill, decode, self._spare_prefill(prefill, config), self._spare_decode(decode, config))

    def _answers(self, requests_per_s: float) -> float:
        """Decode workers by Little's law."""
        c = self.capacity
        answer_s = c.answer_tokens * c.step_ms / 1e3 / c.tokens_per_step
        return requests_per_s * answer_s / max(1.0, c.sequences)

    def _spare_decode(self, decode: float, config: ScalingConfig) -> float:
        context = self.prompt_tokens + self.capacity.answer_tokens / 2
        return config.margin * math.sqrt(decode * min(1.0, context / self.capacity.kv_tokens))

    def _spare_prefill(self, prefill: float, config: ScalingConfig) -> float:
        """A prompt is late when others take its slack, a second and once its own time."""
        own_s = self.uncached_tokens / self.capacity.prefill_tokens_per_s
        return config.margin * math.sqrt(prefill * _SHAPE * own_s / (1.0 + own_s))


def strain(load: Load, prefill: int, decode: int) -> tuple[float, float]:
    """Load over capacity of such pools, spare included; above 1 is short. Prompts use what decodes leave free."""
    need_decode, need_prefill = load.decode + load.spare_decode, load.prefill + load.spare_prefill
    free = max(0.0, decode - need_decode) * SOAKED_SHARE
    of_prefill = need_prefill / (prefill + free) if prefill + free > 0 else math.inf if need_prefill > 0 else 0.0
    of_decode = need_decode / decode if decode > 0 else math.inf if need_decode > 0 else 0.0
    return of_prefill, of_decode


def sample(seen: Observation) -> Sample:
    kv = sum(w.kv_tokens + w.waiting_kv_tokens for w in seen.of(Pool.DECODE, Stage.READY))
    return Sample(
        seen.now,
        seen.covers_s,
        seen.arrived_requests,
        seen.arrived_prompt_tokens,
        seen.arrived_uncached_tokens,
        kv,
        seen.ended_requests,
        seen.ended_answer_tokens,
    )


def demand(
    seen: Observation, history: Sequence[Sample], known: Capacity, config: ScalingConfig, itl_target_ms: float
) -> Demand:
    """`history` ends with the sample of `seen`; `known` is the capacity as it was known before."""
    capacity = _capacity(seen, history, known, config, itl_target_ms * config.itl_share)
    third = max(1, len(history) // 3)
    lately = history[-third:]
    arrived = sum(s.requests for s in lately)
    if not arrived:
        lately = history
        arrived = sum(s.requests for s in lately)
    prompt = sum(s.prompt_tokens for s in lately) / arrived if arrived else 0.0
    uncached = sum(s.uncached_tokens for s in lately) / arrived if arrived else 0.0
    return Demand(
        capacity,
        _trend([(s.at, s.covers_s, s.uncached_tokens / s.covers_s) for s in history if s.covers_s > 0]),
        _trend([(s.at, s.covers_s, s.requests / s.covers_s) for s in history if s.covers_s > 0]),
        _trend([(s.at, s.covers_s, float(s.kv_tokens)) for s in history if s.covers_s > 0]),
        prompt,
        uncached,
        _backlog(seen),
    )


def _backlog(seen: Observation) -> float:
    """Of each worker without its longest prompt: what one prompt takes, no number of workers makes shorter."""
    queued = max(0, seen.queued_tokens - seen.longest_queued_tokens)
    return queued + sum(max(0, w.backlog_tokens - w.longest_prompt_tokens) for w in seen.workers)


def _capacity(
    seen: Observation, history: Sequence[Sample], known: Capacity, config: ScalingConfig, within_ms: float
) -> Capacity:
    """What nobody can measure at present stays as it was."""
    warm = [w for w in seen.workers if w.stage is Stage.READY and w.age_s >= config.warm_up_s]
    found = known
    rates = [w.prefill_tokens_per_s for w in warm if w.pool is Pool.PREFILL and w.prefill_tokens_per_s > 0]
    rates = rates or [w.prefill_tokens_per_s for w in warm if w.prefill_tokens_per_s > 0 and not known.known]
    if rates:
        found = replace(found, prefill_tokens_per_s=_calm(known.prefill_tokens_per_s, sum(rates) / len(rates)))
    ended = sum(s.ended for s in history)
    if ended >= _LEAST_ENDED or (ended and not known.answer_tokens):
        found = replace(found, answer_tokens=sum(s.answer_tokens for s in history) / ended)
    decodes = [w for w in warm if w.pool is Pool.DECODE and w.kv_capacity_tokens and w.step_constant_ms > 0]
    if decodes:
        kv, sequences, step_ms = _resident(decodes, found.answer_tokens, history, within_ms)
        if kv > 0:
            per_step = sum(w.tokens_per_step for w in decodes) / len(decodes)
            found = replace(
                found,
                kv_tokens=_calm(known.kv_tokens, kv),
                sequences=_calm(known.sequences, sequences),
                step_ms=_calm(known.step_ms, step_ms),
                tokens_per_step=per_step,
            )
    return found


def _resident(
    decodes: Sequence[WorkerSeen], answer_tokens: float, history: Sequence[Sample], within_ms: float
) -> tuple[float, float, float]:
    """(KV tokens, sequences, step time) of a decode worker as full as it may be; `within_ms` for each token."""
    running = sum(w.running_sequences for w in decodes)
    arrived = sum(s.requests for s in history)
    if running:
        context = max(1.0, sum(w.kv_tokens for w in decodes) / running)
    elif arrived:
        context = sum(s.prompt_tokens for s in history) / arrived + answer_tokens / 2
    else:
        return 0.0, 0.0, 0.0
    n = len(decodes)
    constant = sum(w.step_constant_ms for w in decodes) / n
    each = sum(w.step_per_sequence_ms + w.step_per_context_token_ms * context for w in decodes) / n
    memory = sum(w.kv_capacity_tokens for w in decodes) / n * _POOL_SHARE
    step_ms = within_ms * sum(w.tokens_per_step for w in decodes) / n
    within = max(1.0, (step_ms - constant) / each) if each > 0 else math.inf
    limits = [w.max_sequences for w in decodes if w.max_sequences]
    at_once = sum(limits) / len(limits) if limits else math.inf
    sequences = min(within, max(1.0, memory / context), at_once)
    return sequences * context, sequences, constant + sequences * each


def _calm(old: float, new: float) -> float:
    """Capacities move slowly; their noise should move nothing."""
    return new if old <= 0 else old + 0.2 * (new - old)


def _trend(points: Sequence[tuple[float, float, float]]) -> Trend:
    """(time, covered, value), oldest first.

    A slope counts only if every quarter lies above (or every one below) the one before, and by more than chance: a step
    is no trend, and carrying it on would overshoot.
    """
    if not points:
        return Trend()
    values = [v for _, _, v in points]
    n = len(values)
    steps = [(b - a) ** 2 for a, b in itertools.pairwise(values)]
    scatter = math.sqrt(sum(steps) / len(steps) / 2) if steps else 0.0  # of one value, whatever the trend
    size = n // 4
    slope, level = 0.0, sum(values) / n
    if size >= 2:
        quarters = [sum(values[n - (4 - i) * size : n - (3 - i) * size]) / size for i in range(4)]
        rises = [b - a for a, b in itertools.pairwise(quarters)]
        least = min(rises, key=abs) if min(rises) > 0 or max(rises) < 0 else 0.0
        rise = _beyond(least, scatter * math.sqrt(2 / size))
        span_s = points[-1][0] - points[n - size - 1][0]
        slope = rise / span_s if span_s > 0 else 0.0
        level = quarters[3] + slope * span_s / 2 if rise else (quarters[2] + quarters[3]) / 2
    recent_values = [v for t, _, v in points if points[-1][0] - t < _RECENT_S]
    recent = sum(recent_values) / len(recent_values)
    surplus = _beyond(recent - level, scatter / math.sqrt(len(recent_values)))
    return Trend(level, slope, level + surplus)


def _beyond(value: float, deviation: float) -> float:
    """What of a difference chance does not explain."""
    if value == 0.0:
        return 0.0
    return value * max(0.0, 1.0 - (deviation / value) ** 2)
