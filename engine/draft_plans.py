"""What a draft model is asked to do in a step: for which sequences it drafts, how much, and what it computes first.

Its KV has the block ids and the tables of the model's own, so a sequence's stands wherever its blocks are, as far as
the draft model wrote it there, for this very sequence (engine/drafting.py). After a prompt, a handoff, a prefix hit, a
migration or steps without drafts it lags behind: then it catches up, some tokens a step, where that will pay.

    depth       pass i of the draft model adds acceptance ** i tokens for each sequence that takes part, and costs one
                step of that model and the verification of its tokens. There are passes while tokens per ms grow
    acceptance  of the sequence's own last drafts; where it has none, what is usual here

Costs are learned from the steps and passes that ran. Those not known yet count as nothing: so they become known.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from engine.drafting import Drafting
from engine.sequence import Sequence
from engine.step_cost import StepCost, StepCostEstimate
from engine.types import TO_COME, DraftWork
from kv_transfer.handoff import Acceptance

MARGIN = 1.15  # by how much a draft must beat the step without it
CATCH_UP_TOKENS = 256  # in a step, at most
_CATCH_UP_SHARE = 0.5  # of a step's time
_LEAST_CATCH_UP = 16
_NEAR = 8  # tokens behind that are not worth a thought
_FORESEEN_TOKENS = 256  # of an answer that may become longer: what it is counted on to have
_USUAL = 0.7  # acceptance, where nobody has drafted yet
_WEIGHT = 0.02  # of a verification in what is usual
_RETURN = 0.01  # with each sequence that begins, what is usual goes back so far


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Of the draft model. `table`: the group of the model's layout whose block tables it has. `coupled`: it is a head
    that needs the model's hidden states (engine/prediction_head.py), of all tokens but the last.
    """

    table: int
    context_tokens: int
    coupled: bool = False


@dataclass(slots=True)
class _Candidate:
    sequence: Sequence
    room: int
    chance: float
    verify_ms: float  # of one draft
    depth: int = 0

    def gain(self, draft: int) -> float:
        return self.chance**draft


class DraftPlans:
    """Of one engine."""

    def __init__(self, limits: DraftLimits, max_tokens: int, block_tokens: int, step_cost: StepCostEstimate) -> None:
        self.cost = StepCostEstimate()  # of the draft model's passes
        self._limits = limits
        self._max_tokens = max_tokens
        self._block_tokens = block_tokens
        self._step_cost = step_cost
        self._usual = _USUAL
        self.brought: dict[int, Acceptance] = {}  # by sequence that came from elsewhere and has not drafted here yet
        self.behind: list[tuple[Sequence, int]] = []  # who catches up in the step that is planned, by how many tokens
        self._over = False

    def stop(self) -> None:
        """The draft model drafts no more: nobody gets places, and no step waits for drafts."""
        self._over = True

    def propose(self, decodes: Items[Sequence], room: Callable[[Sequence], int]) -> dict[int, list[int]]:
        """By sequence id, places for the drafts that the step is to make."""
        self.behind = []
        if self._over:
            return {}
        step, own = self._step_cost.cost(), self.cost.cost()
        count, context = len(decodes), sum(s.num_foreseen for s in decodes)
        ms = step.ms(count, count, context, 0)
        left = self._catch_up(ms, own)
        ready: list[_Candidate] = []
        for sequence in decodes:
            known = len(sequence.tokens)
            most = min(self._max_tokens, room(sequence), self._limits.context_tokens - known)
            if most <= 0:
                continue
            verify_ms = step.per_token_ms + step.per_attention_pair_ms * known
            one = _Candidate(sequence, most, self._drafting(sequence).acceptance(known), verify_ms)
            lag = self._end(sequence) - self._stands(sequence)
            if lag == 0:
                continue  # a head has no state of it yet
            if lag > _NEAR:
                if left == 0 or not self._pays(one, lag, own, count, ms, context):
                    continue
                if lag > left:
                    self.behind.append((sequence, left))
                    left = 0
                    continue
                left -= lag
            ready.append(one)
        self._deepen(ready, float(count), ms, own)
        return {one.sequence.sequence_id: [TO_COME] * one.depth for one in ready if one.depth}

    def work(self, drafting: Items[tuple[Sequence, int]]) -> dict[int, DraftWork]:
        """By sequence id, of the step that was proposed last. `drafting`: for how many there is room."""
        found = {s.sequence_id: self._work(s, self._stands(s), self._end(s)) for s, drafts in drafting if drafts}
        for sequence, tokens in self.behind:
            start = self._stands(sequence)
            found[sequence.sequence_id] = self._work(sequence, start, start + tokens)
        return found

    def _work(self, sequence: Sequence, start: int, end: int) -> DraftWork:
        return DraftWork(start, end, self._limits.table, sequence.computed_from if self._limits.coupled else 0)

    def landed(self, sequence: Sequence, work: DraftWork) -> None:
        self._drafting(sequence).wrote(sequence.tables[work.table], work.end)

    def settle(self, sequence: Sequence, proposed: int, accepted: int) -> None:
        """The last draft was not computed by the draft model, only said. What a head computed of drafts was by states
        of its own, and is computed again.
        """
        drafting = self._drafting(sequence)
        before = len(sequence.tokens) - 1 - accepted
        if (
            drafting.stands == before and not self._limits.coupled
        ):  # else it was not done: the step was repeated, or the draft model failed
            drafting.wrote(sequence.tables[self._limits.table], before + min(accepted, proposed - 1))
        tried = min(accepted + 1, proposed)
        self._usual += _WEIGHT * (accepted / tried - self._usual)

    def _drafting(self, sequence: Sequence) -> Drafting:
        if sequence.drafting is None:
            self._usual += _RETURN * (_USUAL - self._usual)
            sequence.drafting = Drafting(at=len(sequence.tokens), assumed=self._usual)
            sequence.drafting.brought(self.brought.pop(sequence.sequence_id, None))
        return sequence.drafting

    def _stands(self, sequence: Sequence) -> int:
        table = sequence.tables[self._limits.table]
        stands = min(self._drafting(sequence).stands_in(table, self._block_tokens), len(sequence.tokens) - 1)
        return max(stands, sequence.computed_from) if self._limits.coupled else stands

    def _end(self, sequence: Sequence) -> int:
        """Up to where it shall stand before it drafts."""
        return len(sequence.tokens) - self._limits.coupled

    def _catch_up(self, ms: float, own: StepCost) -> int:
        if own.per_token_ms <= 0:
            return CATCH_UP_TOKENS
        return max(_LEAST_CATCH_UP, min(CATCH_UP_TOKENS, int(_CATCH_UP_SHARE * ms / own.per_token_ms)))

    def _pays(self, one: _Candidate, lag: int, own: StepCost, count: int, ms: float, context: int) -> bool:
        """Whether what drafts save in the rest of the answer is worth the tokens that are missing before them."""
        if ms <= 0 or self.cost.steps == 0:
            return True
        token_ms = ms / count
        draft_ms = one.verify_ms + own.ms(count, count, context, 0) / count
        saved, gained = 0.0, 0.0  # in a verification
        for draft in range(1, one.room + 1):
            if one.gain(draft) * token_ms <= MARGIN * draft_ms:
                break
            gained += one.gain(draft)
            saved += one.gain(draft) * token_ms - draft_ms
        sampling, start = one.sequence.spec.sampling, len(one.sequence.tokens) - lag
        left = min(_FORESEEN_TOKENS, sampling.max_tokens - one.sequence.num_emitted)
        lag_ms = own.constant_ms + lag * (own.per_token_ms + own.per_attention_pair_ms * (start + lag / 2))
        return saved * left / (1 + gained) > lag_ms

    def _deepen(self, ready: list[_Candidate], tokens: float, ms: float, own: StepCost) -> None:
        """Pass after pass, while they pay; a sequence whose share does not leaves the others."""
        if ms <= 0:  # nobody knows
            for one in ready:
                one.depth = one.room
            return
        alone_ms = own.per_sequence_ms + own.per_token_ms
        for draft in range(1, self._max_tokens + 1):
            ready = [
                one
                for one in ready
                if one.room >= draft and one.gain(draft) * ms >= MARGIN * tokens * (one.verify_ms + alone_ms)
            ]
            if not ready:
                return
            gain = sum(one.gain(draft) for one in ready)
            context = sum(len(one.sequence.tokens) for one in ready)
            cost = own.ms(len(ready), len(ready), context, 0) + sum(one.verify_ms for one in ready)
            if gain * ms < MARGIN * tokens * cost:
                return
            tokens += gain
            ms += cost
            for one in ready:
                one.depth = draft
