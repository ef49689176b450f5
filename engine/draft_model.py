"""A smaller model that says what the model itself may say next (engine/draft_plans.py decides how much).

It has a KV pool of its own with a block for each block of one group of the model's layout, one that keeps all tokens,
and under the same number: so block tables are the model's, and there is no second allocator. Nobody else reads that
pool: it is no part of the layout, of a handoff or of the prefix cache.

Before a step each sequence that drafts computes what its draft KV lacks, all in one pass; then all say a token each,
pass after pass, greedily, and the last one is said without being computed. What is said only has to be likely: nothing
of an answer depends on it.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from engine.attention.interface import Chunk
from engine.config import AdaptersConfig, EngineConfig, SpeculationConfig
from engine.draft_plans import DraftLimits
from engine.forward import Forward
from engine.kv_shape import KvPool, KvShape
from engine.model_errors import ModelLoadError
from engine.model_loader import ModelFacts, load_model
from engine.native.library import Library
from engine.position_trial import Verdicts
from engine.quantization import quantized, scheme_of
from engine.types import DraftPass, DraftWork, PlanItem
from kv_transfer.layout import Group
from settings.model_path import ModelPathError, resolve_model

log = logging.getLogger(__name__)

MakeForward = Callable[..., Forward]
_TRIAL_PASSES = 3
_MOST_FAILURES = 3  # one after the other
_OFF = "leave it out: set engine.speculation.method to off or lookup"


def load_draft(
    config: EngineConfig, facts: ModelFacts, device: torch.device, library: Library | None, make: MakeForward
) -> DraftModel:
    """`facts`: of the model that it drafts for. Raises ModelLoadError."""
    path = config.speculation.model
    table = whole_table(facts)
    try:
        compared = _check_tokens(resolve_model(config.model), resolve_model(path))
    except ModelPathError as error:
        raise ModelLoadError(f"engine.speculation.model: {error}") from None
    scheme = scheme_of(config.quantization, config.quantized_groups)
    try:
        model, own, trial = load_model(path, config.dtype, device, None, None, scheme)
    except ModelLoadError as error:
        raise ModelLoadError(f"engine.speculation.model: {error}; or {_OFF}") from error
    if any(group.rule.state for group in own.groups):
        raise ModelLoadError(
            f"the draft model {own.name} has recurrent layers, whose state cannot go back to before drafts that were "
            f"rejected; choose another, or {_OFF}"
        )
    if own.vocab_size != facts.vocab_size and not compared:
        raise ModelLoadError(
            f"the draft model {own.name} has a vocabulary of {own.vocab_size} tokens and {facts.name} one of "
            f"{facts.vocab_size}; choose one with the same vocabulary, or {_OFF}"
        )
    shape = KvShape(own.groups, config.block_tokens)
    off = {"batch_invariant": False, "speculation": SpeculationConfig(), "adapters": AdaptersConfig()}
    plain = config.model_copy(update=off)
    forward = make(plain, model, own, shape, device, library, trial, Verdicts(own.name, trial.reference))
    small = quantized(model)
    if small is not None:
        small.packed(forward.name)
    return DraftModel(forward, own, shape, device, table, facts.vocab_size)


def whole_table(facts: ModelFacts) -> int:
    """The group whose tables hold a block for every token of a sequence. Raises ModelLoadError."""
    for number, group in enumerate(facts.groups):
        if not group.rule.state and not group.rule.leaves:
            return number
    raise ModelLoadError(
        f"a draft model needs the blocks of all tokens of a sequence, and every layer of {facts.name} leaves blocks "
        f"behind ({', '.join(str(group.rule) for group in facts.groups)}); set engine.speculation.method to lookup"
    )


def _check_tokens(model: str, draft: str) -> bool:
    """A number must be the same token in both, as far as both have it: there may be rows beyond that no text has.
    False: they do not come with their tokens. Raises ModelLoadError.
    """
    files = [os.path.join(directory, "tokenizer.json") for directory in (model, draft)]
    if not all(map(os.path.exists, files)):
        return False
    from tokenizers import Tokenizer

    ours, theirs = ({i: t for t, i in Tokenizer.from_file(file).get_vocab().items()} for file in files)
    common = ours.keys() & theirs.keys()
    other = next((i for i in sorted(common) if ours[i] != theirs[i]), None)
    if other is not None or 2 * len(common) < len(ours):
        what = f"has {len(theirs)} tokens for {len(ours)}"
        if other is not None:
            what = f"has {theirs[other]!r} for token {other}, which is {ours[other]!r}"
        raise ModelLoadError(
            f"the draft model at {draft} has another vocabulary than {model}: it {what}; choose one with the same "
            f"vocabulary, or {_OFF}"
        )
    return True


class Rows(NamedTuple):
    """Tokens of a sequence behind the `start` whose KV stands in the blocks of `table`."""

    tokens: Sequence[int]
    start: int
    table: Sequence[int]
    ahead: int = 0  # their positions are so much larger (engine/prediction_head.py, and the next)
    states: torch.Tensor | None = None  # that come with them


class DraftModel:
    def __init__(
        self, forward: Forward, facts: ModelFacts, shape: KvShape, device: torch.device, table: int, vocabulary: int
    ) -> None:
        """`table`: the group of the model whose blocks it has. `vocabulary`: of the model."""
        self._forward = forward
        self._facts = facts
        self._shape = shape
        self._device = device
        self._table = table
        self._first_id = 0
        self._kv: KvPool | None = None
        self._failures = 0
        self._vocabulary = min(vocabulary, facts.vocab_size)
        reach = facts.context_limit_tokens
        if facts.original_context_tokens:  # it would have to begin again, by its other rotary table
            reach = min(reach, facts.original_context_tokens)
        self.limits = DraftLimits(table, reach)

    def __str__(self) -> str:
        return f"{self._facts.name} ({self._forward.name}, {self.block_bytes} bytes of KV a block)"

    @property
    def over(self) -> bool:
        """It has failed too often, and drafts no more until the worker starts again."""
        return self._failures >= _MOST_FAILURES

    @property
    def block_bytes(self) -> int:
        return sum(group.block_bytes(self._shape.block_tokens) for group in self._shape.groups)

    def beside(self, groups: Sequence[Group]) -> tuple[int, ...]:
        """By group of the model, bytes that each of its blocks takes here."""
        return tuple(self.block_bytes if number == self._table else 0 for number in range(len(groups)))

    def begin(self, blocks: Sequence[int]) -> None:
        """`blocks`: by group of the model. The first passes are the slow ones, and teach nothing: they run here."""
        count = blocks[self._table]
        self._first_id = sum(blocks[: self._table])
        self._kv = self._shape.pool([count] * len(self._shape.groups), self._device)
        log.info("draft model %s: %d blocks, %.1f MiB of KV", *(self, count, count * self.block_bytes / (1 << 20)))
        tokens = min(self._shape.block_tokens, self.limits.context_tokens) - 1
        with torch.inference_mode():
            for size in [tokens] * _TRIAL_PASSES if tokens else []:
                self._pass([Rows([0] * size, 0, [self._first_id])])
                self._pass([Rows([0], size, [self._first_id])])

    def improve(self) -> bool:
        improve = getattr(self._forward, "improve", None)
        return improve is not None and improve(self._kv)

    def draft(self, items: Sequence[PlanItem]) -> tuple[Sequence[PlanItem], Sequence[DraftPass]]:
        """The items with the drafts that their plan has places for, and what that took. Where it fails answers go on
        without drafts.
        """
        asked = [(place, item, item.draft) for place, item in enumerate(items) if item.draft is not None]
        if not asked:
            return items, ()
        passes: list[DraftPass] = []
        drafts: list[list[int]] = [[] for _ in asked]
        if not self.over:
            try:
                drafts = self._say(asked, passes)
                self._failures = 0
            except Exception:
                self._failures += 1
                drafts, passes = [[] for _ in asked], []
                over = "; it drafts no more until the worker starts again" if self.over else ""
                log.exception("the draft model %s failed, and the step goes on without drafts%s", self, over)
        found = list(items)
        for (place, item, _), own in zip(asked, drafts, strict=True):
            if item.matcher is not None and own:
                del own[item.matcher.accepts(own) :]
            known = item.token_ids[: len(item.token_ids) - len(item.drafts)]
            found[place] = replace(item, token_ids=[*known, *own], drafts=own, draft=None)
        return found, passes

    def keep(self, items: Sequence[PlanItem]) -> None:
        """After each step of the model, of these items in their order: a draft model needs nothing of it."""

    def _say(self, asked: Sequence[tuple[int, PlanItem, DraftWork]], passes: list[DraftPass]) -> list[list[int]]:
        tables = [self._table_of(item, work.table) for _, item, work in asked]
        said, states, took = self._pass(
            [self._known(item, work, table) for (_, item, work), table in zip(asked, tables, strict=True)]
        )
        passes.append(took)
        drafts: list[list[int]] = [
            [token] if item.drafts else [] for (_, item, _), token in zip(asked, said, strict=True)
        ]
        for number in itertools.count(1):
            going = [i for i, (_, item, _) in enumerate(asked) if len(item.drafts) > number]
            if not going:
                break
            rows = [self._said(drafts[i], asked[i][2], tables[i], states[i]) for i in going]
            said, newer, took = self._pass(rows)
            passes.append(took)
            for i, token, state in zip(going, said, newer, strict=True):
                drafts[i].append(token)
                states[i] = state
        return drafts

    @staticmethod
    def _table_of(item: PlanItem, table: int) -> Sequence[int]:
        return item.block_ids if table == 0 else item.others[table - 1]

    def _known(self, item: PlanItem, work: DraftWork, table: Sequence[int]) -> Rows:
        """What is missing before the first draft."""
        return Rows(item.history[work.start : work.end], work.start, table)

    def _said(self, drafts: list[int], work: DraftWork, table: Sequence[int], state: torch.Tensor | None) -> Rows:
        """The last draft, before the next. `state`: that the pass before it made."""
        return Rows(drafts[-1:], work.end + len(drafts) - 1, table)

    def _pass(self, rows: Sequence[Rows]) -> tuple[list[int], list[torch.Tensor | None], DraftPass]:
        """Of each of `rows` the token after its last one, and its state (engine/prediction_head.py); their KV is
        written.
        """
        began = time.perf_counter()
        order = sorted(
            range(len(rows)), key=lambda i: len(rows[i].tokens) > 1 or rows[i].start == 0
        )  # as in a step of the model
        token_ids: list[int] = []
        positions: list[int] = []
        chunks: list[Chunk] = []
        keep: list[int] = []
        context = prompt = 0
        pairs = 0.0
        further = len(self._shape.groups) - 1
        for i in order:
            tokens, start, table, ahead, _ = rows[i]
            count = len(tokens)
            blocks = [block - self._first_id for block in table]
            chunks.append(Chunk(len(token_ids), count, start, blocks, others=(blocks,) * further))
            token_ids += [min(token, self._facts.vocab_size - 1) for token in tokens]
            positions += range(start + ahead, start + ahead + count)
            keep.append(len(token_ids) - 1)
            if count == 1:
                context += start + 1
            else:
                prompt += count
                pairs += count * (start + count / 2)
        logits, made = self._run([rows[i] for i in order], token_ids, positions, chunks, keep)
        said = logits[:, : self._vocabulary].argmax(-1).tolist()
        tokens_of: list[int] = [0] * len(rows)
        states: list[torch.Tensor | None] = [None] * len(rows)
        for place, i in enumerate(order):
            tokens_of[i] = said[place]
            states[i] = None if made is None else made[place]
        ms = (time.perf_counter() - began) * 1e3
        return tokens_of, states, DraftPass(len(rows), len(token_ids), context, pairs, prompt, ms)

    def _run(
        self, rows: Sequence[Rows], token_ids: list[int], positions: list[int], chunks: list[Chunk], keep: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the rows of `keep`, and their states."""
        assert self._kv is not None
        return self._forward.forward(self._kv, token_ids, positions, chunks, keep), None
