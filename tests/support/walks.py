"""A model's answers without a scheduler: sequences packed, in chunks, on their own block tables, in every group.

The blocks that a rule has left behind are taken out of the tables, as an engine that frees them would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.attention.interface import Chunk, StateUse
from engine.runner import ModelRunner
from tests.support.prompts import clear_choice

_CHUNK = 7


@dataclass
class Line:
    """`tables`: by group. `state`: the slot that holds it, -1 for none yet."""

    tokens: list[int]
    wanted: int
    tables: list[list[int]]
    slots: tuple[int, int]
    done: int = 0
    state: int = -1
    answer: list[int] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return len(self.answer) >= self.wanted


class Walks:
    """`most`: tokens of a sequence, at most; `lines`: how many sequences there may be."""

    def __init__(self, runner: ModelRunner, most: int, lines: int) -> None:
        self._runner = runner
        self._size = runner.block_tokens
        self._blocks = -(-most // self._size)
        self._groups = runner.shape.groups
        self._pool = runner.shape.pool([max(self._blocks, 2) * lines] * len(self._groups), runner.device)
        self.lines: list[Line] = []

    def add(self, tokens: Sequence[int], wanted: int, after: Line | None = None) -> Line:
        """`after`: its first blocks are used again, as far as the tokens are the same: a prefix hit."""
        number = len(self.lines)
        own = list(range(number * self._blocks, (number + 1) * self._blocks))
        line = Line(list(tokens), wanted, [list(own) for _ in self._groups], (2 * number, 2 * number + 1))
        if after is not None:
            same = next((i for i, (a, b) in enumerate(zip(tokens, after.tokens, strict=False)) if a != b), len(tokens))
            hit = min(same, after.done, len(tokens) - 1) // self._size
            assert hit > 0
            for mine, theirs in zip(line.tables, after.tables, strict=True):
                mine[:hit] = theirs[:hit]
            line.done = hit * self._size
        self.lines.append(line)
        return line

    def go_on(self, line: Line, tokens: Sequence[int], wanted: int) -> None:
        """A further turn of a finished one."""
        line.tokens += tokens
        line.wanted = len(line.answer) + wanted

    def run(self) -> None:
        while going := [line for line in self.lines if not line.is_finished]:
            going.sort(key=lambda line: len(line.tokens) - line.done != 1)  # decodes first
            self._step([(line, min(_CHUNK, len(line.tokens) - line.done)) for line in going])

    def _step(self, parts: list[tuple[Line, int]]) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        chunks: list[Chunk] = []
        last: list[int] = []
        for line, count in parts:
            chunks.append(self._chunk(line, len(tokens), count))
            tokens += line.tokens[line.done : line.done + count]
            positions += range(line.done, line.done + count)
            last.append(len(tokens) - 1)
        with torch.inference_mode():
            logits = self._runner.forward.forward(self._pool, tokens, positions, chunks, last)
        for (line, count), row in zip(parts, logits.float().cpu(), strict=True):
            line.done += count
            if line.done == len(line.tokens):
                line.answer.append(clear_choice(row))
                line.tokens.append(line.answer[-1])

    def _chunk(self, line: Line, first_row: int, count: int) -> Chunk:
        tables: list[list[int]] = []
        state: Any = None
        for group, whole in zip(self._groups, line.tables, strict=True):
            if group.rule.state:
                tables.append([])
                target = line.slots[line.state == line.slots[0]]
                state = StateUse(line.state, target)
                line.state = target
                continue
            left = group.rule.first_block(line.done, self._size)
            tables.append([-1] * left + whole[left:])
        return Chunk(first_row, count, line.done, tables[0], tuple(tables[1:]), state)


def reference_answer(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """transformers' own `generate`, greedy, with its cache."""
    ids = torch.tensor([list(tokens)])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            eos_token_id=None,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
    for row in out.logits:
        clear_choice(row[0])
    return out.sequences[0, len(tokens) :].tolist()
