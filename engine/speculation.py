"""Speculative decoding: how many tokens to draft for which sequence, and what became of them.

    propose     at planning: drafts for the decodes of a step, none where they do not pay. Of a draft model there are
                as many places as it shall fill (engine/draft_plans.py)
    draft       it fills them before the step (engine/draft_model.py)
    verify      the step computes the drafts' rows with the last token's and samples each (engine/verify.py)
    settle      at commit: accepted drafts are tokens of the answer; of the others nothing is kept

Drafts pay by what was measured. A sequence's drafts are accepted with chance p each, one after the other: so its i-th
one adds p ** i tokens to the step, and to the step's duration what a token costs by the learned step costs
(engine/step_cost.py). A draft is worth it while tokens per millisecond grow. p is of the sequence's own last drafts and
fades, so that a sequence whose text did not repeat is tried again later. A token's value never depends on any of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.draft_plans import MARGIN, DraftLimits, DraftPlans
from engine.drafting import Drafted, Drafting
from engine.sequence import Sequence
from engine.step_cost import StepCostEstimate, StepShape
from engine.types import DraftWork, PlanItem, StepPlan, StepResult
from kv_transfer.handoff import Acceptance

if TYPE_CHECKING:
    from engine.config import SpeculationConfig


_REPORT_EVERY = 8  # verifications of a sequence


@dataclass(frozen=True, slots=True)
class SpeculationLimits:
    max_tokens: int  # drafts for a sequence in a step
    least_match: int = 2  # tokens that a look-up must match
    draft: DraftLimits | None = None  # a model drafts; else drafts are looked up
    method: str = "lookup"  # as engine.speculation.method says it

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.least_match < 2:
            raise ValueError(f"speculation needs max_tokens >= 1 and least_match >= 2, got {self}")


def limits_of(config: SpeculationConfig, draft: DraftLimits | None = None) -> SpeculationLimits | None:
    """None: no speculation."""
    return (
        None
        if config.method == "off"
        else SpeculationLimits(config.max_tokens, config.least_match_tokens, draft, config.method)
    )


@dataclass(slots=True)
class SpeculationCounts:
    """Since the engine began."""

    verified: int = 0  # how often: of one sequence in one step
    proposed: int = 0
    accepted: int = 0  # and taken into the answer


class Speculation:
    """Of one engine."""

    def __init__(
        self, limits: SpeculationLimits, step_cost: StepCostEstimate, context_limit: int, block_tokens: int = 1
    ) -> None:
        self.counts = SpeculationCounts()
        self.draft: DraftPlans | None = None
        if limits.draft is not None:
            self.draft = DraftPlans(limits.draft, limits.max_tokens, block_tokens, step_cost)
        self._limits = limits
        self._brought: dict[int, Acceptance] = {} if self.draft is None else self.draft.brought
        self._drafted: dict[int, Drafted] = {}
        self._news: set[int] = set()
        self._step_cost = step_cost
        self._context_limit = context_limit

    def propose(self, decodes: Items[Sequence]) -> dict[int, list[int]]:
        """By sequence id. `decodes` are all of the step's; nothing is changed but what they keep for this."""
        if self.draft is not None:
            return self.draft.propose(decodes, self.room)
        cost = self._step_cost.cost()
        count, context = len(decodes), sum(s.num_foreseen for s in decodes)
        ms = cost.ms(count, count, context, 0)
        tokens = float(count)
        found: list[tuple[Sequence, list[int], float, float]] = []
        for sequence in decodes:
            room = min(self._limits.max_tokens, self.room(sequence))
            if room <= 0:
                continue
            drafting = sequence.drafting
            if drafting is None:
                drafting = sequence.drafting = Drafting(at=len(sequence.tokens))
                drafting.brought(self._brought.pop(sequence.sequence_id, None))
            chance = drafting.acceptance(len(sequence.tokens))
            each_ms = cost.per_token_ms + cost.per_attention_pair_ms * len(sequence.tokens)
            depth = min(room, _depth(chance, each_ms * count / ms if ms > 0 else 0.0))
            drafts = drafting.lookup.drafts(sequence.tokens, depth, self._limits.least_match) if depth else []
            matcher = sequence.spec.matcher
            if drafts and matcher is not None:
                del drafts[matcher.accepts(drafts) :]
            if drafts:
                found.append((sequence, drafts, chance, each_ms))
                tokens += _expected(chance, len(drafts))
                ms += each_ms * len(drafts)
        for _, drafts, chance, each_ms in found:  # what the others' drafts add makes the step harder to beat
            del drafts[_depth(chance, each_ms * tokens / ms if ms > 0 else 0.0) :]
        return {sequence.sequence_id: drafts for sequence, drafts, _, _ in found if drafts}

    def work(self, decodes: Items[Sequence], drafts: Mapping[int, list[int]]) -> Mapping[int, DraftWork]:
        """By sequence id, what a draft model does before the step for which `drafts` were proposed."""
        if self.draft is None:
            return {}
        return self.draft.work([(s, len(drafts.get(s.sequence_id, ()))) for s in decodes])

    def waits(self, plan: StepPlan, coming: Iterable[Sequence]) -> bool:
        """Whether the step after `plan` had better be planned when the tokens that are coming are known: their drafts
        may be accepted, or, as far as the tokens before them tell, some of these sequences will have drafts, or a draft
        model has something to catch up.
        """
        if any(item.drafts for item in plan.items):
            return True
        drafts = self.propose([s for s in coming if not s.ending])
        return bool(drafts) or (self.draft is not None and bool(self.draft.behind))

    def drafted(self, result: StepResult) -> float:
        """Learns what the draft model's passes cost. Returns how many milliseconds they took of the step."""
        if result.drafts_over and self.draft is not None:
            self.draft.stop()
        if not result.passes or self.draft is None:
            return 0.0
        for p in result.passes:
            shape = StepShape(p.sequences, p.tokens, p.context_tokens, p.attention_pairs, p.prompt_tokens)
            self.draft.cost.observe(shape, p.ms)
        return sum(p.ms for p in result.passes)

    def landed(self, sequence: Sequence, item: PlanItem) -> None:
        if item.draft is not None and self.draft is not None:
            self.draft.landed(sequence, item.draft)

    def settle(self, sequence: Sequence, proposed: int, accepted: int, kept: int) -> None:
        """`kept`: of those accepted, the ones that the answer had not ended before."""
        if self.draft is not None:
            self.draft.settle(sequence, proposed, kept)
        if sequence.drafting is not None:
            sequence.drafting.note(proposed, accepted)
            drafted = sequence.drafting.count(proposed, kept, self._limits.method)
            self._drafted[sequence.sequence_id] = drafted
            if drafted.verified % _REPORT_EVERY == 1:
                self._news.add(sequence.sequence_id)
        self.counts.verified += 1
        self.counts.proposed += proposed
        self.counts.accepted += kept

    # What a sequence has learned, and goes on with elsewhere. The worker forgets each sequence that it was told of.

    def bring(self, sequence_id: int, learned: Acceptance | None) -> None:
        """Of a sequence from elsewhere: it drafts at once as it did there, if that was by the same method."""
        if learned is not None and learned.method == self._limits.method:
            self._brought[sequence_id] = learned

    def news(self) -> dict[int, Drafted]:
        """By sequence: its first verification, and every few."""
        news, self._news = self._news, set()
        return {sequence_id: self._drafted[sequence_id] for sequence_id in news}

    def drafted_of(self, sequence_id: int) -> Drafted | None:
        return self._drafted.get(sequence_id)

    def forget(self, sequence_id: int) -> None:
        self._brought.pop(sequence_id, None)
        self._drafted.pop(sequence_id, None)
        self._news.discard(sequence_id)

    def room(self, sequence: Sequence) -> int:
        """Drafts that could be accepted and not end its answer or its life here before the step's last token does."""
        if sequence.hand_over or sequence.retain:
            return 0  # who reads its blocks has room for so many tokens, and no more
        known = len(sequence.tokens)
        answer = sequence.spec.sampling.max_tokens - sequence.num_emitted
        return min(answer, self._context_limit - known, sequence.outgrows_at - known) - 1


def _depth(chance: float, price: float) -> int:
    """The largest i with chance ** i > price, where `price` is a draft's cost in tokens of the step without it."""
    price *= MARGIN
    if price <= 0:
        return 1 << 30
    if price >= chance:
        return 0
    return int(math.log(price) / math.log(chance))


def _expected(chance: float, drafts: int) -> float:
    return chance * (1 - chance**drafts) / (1 - chance)
