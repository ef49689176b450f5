"""Over how many devices a worker of each pool should be split: what tensor parallelism does to both. Pure.

    more devices a worker   a prompt is computed sooner, a step of decodes reads its weights and KV sooner, and there is
                            more memory for KV beside one copy of the weights
    what it costs           two all-reduces a layer over NVLink: bytes that grow with the tokens of a step, and a
                            latency that every step pays; and fewer workers of the same devices

Prompts have many tokens a step and pay for bytes, decodes have few and pay the latency. That is why the pools choose
separately.

1. `figures`    on the roofline, a degree at a time: TTFT of a prompt alone, the largest batch within the ITL target and
                the memory, and tokens a second for each device
2. `splits`     for every pair of degrees, how many workers of each so many devices give, so that neither pool waits
3. the pairs are then simulated, with the router's own decisions (deploy/plan_degrees.py)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from simulator.cost_model import H200, CostModel, CostModelError, StepCost, exchange, preset, preset_of, shape_of
from simulator.planner import Mix


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one worker of so many devices. Times in milliseconds; rates are for each device."""

    degree: int
    kv_tokens: int
    ttft_ms: float  # of a mean prompt alone on a worker
    prompt_exchange_share: float  # of that: all-reduces
    batch: int  # answers at once, within the ITL target, the memory and the limit; 0: not even one
    itl_ms: float  # at that batch
    decode_exchange_share: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float

    def requests_per_s(self, mix: Mix) -> tuple[float, float]:
        """That a worker prefills, and that it decodes."""
        new = max(1.0, mix.input_tokens * (1 - mix.cached_share))
        answers = max(1.0, mix.output_tokens)
        return self.degree * self.prompt_tokens_per_s / new, self.degree * self.output_tokens_per_s / answers


def figures(
    name: str, degrees: Iterable[int], mix: Mix, itl_target_ms: float, chunk_tokens: int, most_sequences: int = 1 << 20
) -> list[Figures]:
    """`name`: of a preset. Degrees over which the model does not fit are left out. Raises CostModelError if all are."""
    found = []
    for degree in degrees:
        try:
            costs = preset(preset_of(name, degree))
        except CostModelError as error:
            if "does not fit" not in str(error):
                raise
            continue
        fits = min(most_sequences, int(costs.kv_capacity_tokens // (mix.input_tokens + mix.output_tokens)))
        found.append(_of(name, degree, costs, mix, itl_target_ms, chunk_tokens, fits))
    if not found:
        raise CostModelError(f"{name} fits over none of these numbers of devices; ask for more")
    return found


def _of(
    name: str, degree: int, costs: CostModel, mix: Mix, itl_target_ms: float, chunk_tokens: int, fits: int
) -> Figures:
    step = costs.step
    prompt = max(1, round(mix.input_tokens * (1 - mix.cached_share)))
    cached = round(mix.input_tokens) - prompt
    ttft_ms = step.prompt_ms(prompt, chunk_tokens, cached)
    context = mix.input_tokens + mix.output_tokens / 2
    batch = _largest_batch(step, context, itl_target_ms, fits)
    itl_ms = step.decode_ms(max(batch, 1), max(batch, 1) * context)
    exchange_token_ms, exchange_step_ms = exchange(H200, shape_of(name)[0], degree)
    steps = -(-prompt // chunk_tokens)
    return Figures(
        degree,
        costs.kv_capacity_tokens,
        ttft_ms,
        (prompt * exchange_token_ms + steps * exchange_step_ms) / ttft_ms,
        batch,
        itl_ms,
        (batch * exchange_token_ms + exchange_step_ms) / itl_ms,
        prompt / ttft_ms * 1e3 / degree,
        batch / itl_ms * 1e3 / degree,
    )


def _largest_batch(step: StepCost, context: float, target_ms: float, fits: int) -> int:
    low, high = 0, max(0, fits)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if step.decode_ms(middle, middle * context) <= target_ms else (low, middle - 1)
    return low


@dataclass(frozen=True, slots=True)
class Split:
    """Workers of each pool, and the requests a second that the slower of the two can do."""

    prefill_degree: int
    decode_degree: int
    prefill: int
    decode: int
    requests_per_s: float

    @property
    def devices(self) -> int:
        return self.prefill * self.prefill_degree + self.decode * self.decode_degree


def splits(found: Sequence[Figures], mix: Mix, devices: int) -> list[Split]:
    """The best of every pair of degrees, the best pair first; a pair that does not fit is left out."""
    best: list[Split] = []
    for prefill in found:
        for decode in found:
            prefills, _ = prefill.requests_per_s(mix)
            _, decodes = decode.requests_per_s(mix)
            one = [
                Split(prefill.degree, decode.degree, p, d, min(p * prefills, d * decodes))
                for p in range(1, devices // prefill.degree + 1)
                if (d := (devices - p * prefill.degree) // decode.degree) > 0
            ]
            if one:
                best.append(max(one, key=lambda s: (s.requests_per_s, -s.devices)))
    return sorted(best, key=lambda s: -s.requests_per_s)
