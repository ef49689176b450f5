"""A step that failed, again in parts: what belongs to one row must not end the others.

    1. the rows are halved, and halved again where a half fails     each level costs as much as the step did, and there
                                                                    are log2(rows) of them at most
    2. a row that fails by itself is a suspect. Is it the row?      the runner computes a token of no sequence's in that
                                                                    row's own last block, which nobody else has
       that works                                                   the row ends, with its cause
       that fails                                                   nothing can be computed here: the worker ends

Nothing of a failed step counts: no token was taken, and KV that it wrote is written again, the same bytes in the same
places. Sampling depends on (seed, position), so the others get the tokens that they would have got.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from engine.model_errors import AdapterError, RankLost
from engine.prompt_logprobs import PromptLogprobs
from engine.types import Failed, PlanItem, Sampled, SamplingParams, StepPlan, StepResult
from kv_transfer.handoff import TokenLogprobs
from kv_transfer.layout import StateUse

log = logging.getLogger(__name__)

Execute = Callable[[StepPlan], StepResult]
_CAUSE_CHARS = 300


def is_fatal(error: BaseException) -> bool:
    """Not about a step. Panics of libraries in Rust are no Exceptions, and are about one."""
    return isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | RankLost)


def with_known_tokens(plan: StepPlan, before: StepResult) -> StepPlan:
    """A step that was planned while the one before it computed, when that one's result is there.

    A row whose token did not come stays as it is: its sequence has ended.
    """
    items = list(plan.items)
    for place, item in enumerate(items):
        if item.follows is not None:
            token = before.token_ids[item.follows]
            if token is not None:
                items[place] = replace(item, token_ids=(token,), follows=None)
    return replace(plan, items=tuple(items))


def repeat(plan: StepPlan, error: BaseException, execute: Execute, counts: Sequence[bool]) -> StepResult:
    """`counts`: which rows are still for somebody; the others are left out. Raises what ends the worker."""
    rows = [place for place, wanted in enumerate(counts) if wanted]
    log.warning("step %d failed and is repeated in parts, %d rows: %s", plan.step, len(rows), told(error))
    parts = _Parts(plan, execute)
    if len(rows) > 1:
        parts.halve(rows)
    elif rows:
        parts.run(rows)
    return parts.result()


def told(error: BaseException) -> str:
    """On one line, whatever it says."""
    words = " ".join(str(error).split())[:_CAUSE_CHARS]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


class _Parts:
    def __init__(self, plan: StepPlan, execute: Execute) -> None:
        self._plan = plan
        self._execute = execute
        self._tokens: list[int | None] = [None] * len(plan.items)
        self._logprobs: list[TokenLogprobs | None] = [None] * len(plan.items)
        self._failures: dict[int, Failed] = {}
        self._further: dict[int, Sequence[Sampled]] = {}
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}
        self._works = False  # anything, since the step failed

    def result(self) -> StepResult:
        return StepResult(
            tuple(self._tokens),
            tuple(self._logprobs),
            self._failures,
            self._further,
            prompt_logprobs=self._prompt_logprobs,
        )

    def halve(self, rows: Sequence[int]) -> None:
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            if half:
                self.run(half)

    def run(self, rows: Sequence[int]) -> None:
        items = tuple(self._plan.items[place] for place in rows)
        try:
            done = self._execute(StepPlan(self._plan.step, items))
        except BaseException as error:
            if is_fatal(error):
                raise
            if len(rows) > 1:
                self.halve(rows)
            else:
                self._suspect(rows[0], error)
            return
        self._works = True
        for i, place in enumerate(rows):
            self._tokens[place], self._logprobs[place] = done.token_ids[i], done.logprobs[i]
            if i in done.failures:
                self._failures[place] = done.failures[i]
            if i in done.further:
                self._further[place] = done.further[i]
            if i in done.prompt_logprobs:
                self._prompt_logprobs[place] = done.prompt_logprobs[i]

    def _suspect(self, place: int, error: BaseException) -> None:
        item = self._plan.items[place]
        if not self._works:
            self._probe(item)
        log.error("step %d fails with one sequence, which ends: %s", self._plan.step, told(error), exc_info=error)
        if isinstance(error, AdapterError):
            self._failures[place] = Failed(" ".join(str(error).split()), adapter_lost=True)
            return
        self._failures[place] = Failed(
            f"the worker could not compute this sequence at position {item.position} ({told(error)}); "
            "its log has the whole of it"
        )

    def _probe(self, item: PlanItem) -> None:
        """Raises if the runner computes nothing at all any more."""
        probe = PlanItem(
            sequence_id=0,
            token_ids=(0,),
            start=0,
            block_ids=(item.block_ids[-1],),  # of a token that is not computed yet: never shared
            others=[table[-1:] for table in item.others],
            state=None if item.state is None else StateUse(-1, item.state.target),
            sample=True,
            position=0,
            sampling=SamplingParams(max_tokens=1),
            prompt_len=1,
            history=(0,),
        )
        self._execute(StepPlan(self._plan.step, (probe,)))
        self._works = True
