"""Whether a model is computed rightly over the whole context that is served: tried at start, on excerpts of it.

1. `take_reference`, before anything is changed in the model: excerpts of a few tokens lie at the context's beginning,
   across every length that the configuration names (the original context of a rotary scaling, a window, a chunk, the
   floor of a temperature scale), and at the context limit. Each runs alone through transformers' own attention, behind
   a cache that says how many tokens came before it and holds none of them: positions are shifted, not computed.
2. `disagreement` runs all of them through a Forward as the engine would: packed in one step, whatever their positions,
   then on behind the cached beginning, the last token as a decode.

So it sees what looks at absolute positions, at the largest position of a batch, or at the row of a packed step, and
what an attention does beside the products that we compute (sinks, soft caps). A faster path that fails gives way to a
slower one; if the slowest fails, the model is refused, with the context limit that would do if there is one.

Excerpts see nothing of each other's keys, so windows and chunks are not tried here: limits keep within them
(engine/model_check.py).
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.attention.interface import Chunk, StateUse
from engine.forward import Forward
from engine.kv_shape import KvShape

_TOKENS = 12  # of an excerpt
_STEPS = (8, 3, 1)  # in which the engine computes it
_SLOTS = 2  # for an excerpt's states
_MOST_LENGTHS = 6
_SHORTEST_LENGTH = 16
_NAMES_A_LENGTH = re.compile("position|window|chunk|scale|length|context|original")
# Of the logits' deviation, for the median row of a step. In narrow types two of transformers' own ways of computing
# attention say how far roundings lead; what differs by several times as much is no rounding.
_EXACT = {torch.float32: 1e-3}
_ROUNDINGS, _LEAST, _MOST = 4.0, 2e-2, 2e-1


class NoReference(Exception):
    """The model does not run with transformers' own attention; the message says why."""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """`logits` [_TOKENS, vocabulary] float32, on the CPU."""

    first: int
    tokens: tuple[int, ...]
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Reference:
    excerpts: tuple[Excerpt, ...]
    allowed: float

    def within(self, limit: int) -> Reference:
        return Reference(tuple(e for e in self.excerpts if e.first + len(e.tokens) <= limit), self.allowed)


def named_lengths(described: Mapping[str, Any], limit: int) -> list[int]:
    """Numbers in a configuration that may be lengths, in order; shorter than `limit`."""
    found: set[int] = set()

    def look(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                look(inner, str(key))
        elif isinstance(value, int | float) and _NAMES_A_LENGTH.search(name) and _SHORTEST_LENGTH <= value < limit:
            found.add(int(value))

    look(described, "")
    return sorted(found)[:_MOST_LENGTHS]


def take_reference(model: Any, described: Mapping[str, Any], dtype: torch.dtype, limit: int) -> Reference:
    """Raises NoReference. `described`: the checkpoint's config.json; `limit`: the context that is served."""
    device = model.get_input_embeddings().weight.device
    size = model.get_input_embeddings().weight.shape[0]
    length = min(_TOKENS, limit)
    starts = {0, limit - length, *(max(0, n - length // 2) for n in named_lengths(described, limit))}
    generator = torch.Generator().manual_seed(0)
    excerpts, roundings = [], 0.0
    for first in sorted(min(start, limit - length) for start in starts):
        tokens = torch.randint(size, (length,), generator=generator)
        logits = _alone(model, tokens.to(device), first, "eager")
        excerpts.append(Excerpt(first, tuple(tokens.tolist()), logits))
        if dtype not in _EXACT:
            roundings = max(roundings, _apart(_alone(model, tokens.to(device), first, "sdpa"), logits))
    allowed = _EXACT.get(dtype) or min(_MOST, max(_LEAST, _ROUNDINGS * roundings))
    return Reference(tuple(excerpts), allowed)


def disagreement(forward: Forward, reference: Reference, shape: KvShape, device: Any) -> str:
    """What `forward` computes otherwise, and where; "" if nothing."""
    excerpts = reference.excerpts
    blocks = -(-_TOKENS // shape.block_tokens)
    counts = [(_SLOTS if group.rule.state else blocks) * len(excerpts) for group in shape.groups]
    pool = shape.pool(counts, torch.device(device))
    has_state = any(group.rule.state for group in shape.groups)
    rows: list[list[torch.Tensor]] = [[] for _ in excerpts]
    done = 0
    spans = [(e.first, e.first + len(e.tokens)) for e in excerpts]
    with torch.inference_mode(), getattr(forward, "only_positions", contextlib.nullcontext)(spans):
        for number, step in enumerate(_STEPS):
            chunks: list[Chunk] = []
            tokens: list[int] = []
            positions: list[int] = []
            whose: list[int] = []
            for n, excerpt in enumerate(excerpts):
                new = excerpt.tokens[done : done + step]
                if not new:
                    continue
                table = list(range(n * blocks, (n + 1) * blocks))
                others = (table,) * (len(shape.groups) - 1)
                state = _slots(n, number) if has_state else None
                chunks.append(Chunk(len(tokens), len(new), done, table, others, state))
                positions += range(excerpt.first + done, excerpt.first + done + len(new))
                tokens += new
                whose += [n] * len(new)
            if not chunks:
                break
            logits = forward.forward(pool, tokens, positions, chunks, list(range(len(tokens)))).float().cpu()
            for n, row in zip(whose, logits, strict=True):
                rows[n].append(row)
            done += step
    for excerpt, computed in zip(excerpts, rows, strict=True):
        off = _apart(torch.stack(computed), excerpt.logits)
        if not off <= reference.allowed:  # a NaN is no agreement
            last = excerpt.first + len(excerpt.tokens) - 1
            return (
                f"at positions {excerpt.first} to {last} its logits differ from transformers' by {off:.2g} of their "
                f"deviation, and {reference.allowed:.2g} is rounding"
            )
    return ""


def _slots(excerpt: int, step: int) -> StateUse:
    """Two for each excerpt, in turn."""
    first = excerpt * _SLOTS
    return StateUse(first + (step - 1) % _SLOTS if step else -1, first + step % _SLOTS)


def servable_limit(
    forward: Forward, reference: Reference, shape: KvShape, device: Any, described: Mapping[str, Any], limit: int
) -> int | None:
    """The longest named length up to which `forward` agrees, if there is one."""
    for length in reversed(named_lengths(described, limit)):
        part = reference.within(length)
        if part.excerpts and not disagreement(forward, part, shape, device):
            return length
    return None


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the step that is furthest off, its median row: a fault may show behind the cached beginning only."""
    rows = (a - b).square().mean(-1).sqrt() / b.std()
    ends = list(itertools.accumulate(_STEPS, initial=0))
    parts = [rows[start:end] for start, end in itertools.pairwise(ends) if start < len(rows)]
    return max(part.median().item() for part in parts)


def _alone(model: Any, tokens: torch.Tensor, first: int, attention: str) -> torch.Tensor:
    from transformers import DynamicCache

    class Before(DynamicCache):
        """Says that `first` tokens came before, and holds none of them; recurrent layers begin with nothing."""

        def get_seq_length(self, *_: Any, **__: Any) -> int:
            return first

        def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
            return query_length, first

        def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
            return key, value

        def update_indexer(self, key: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return key

    positions = torch.arange(first, first + len(tokens), device=tokens.device)

    def computed(**cache: Any) -> torch.Tensor:
        with torch.inference_mode(), _attention_of(model, attention):
            return model(input_ids=tokens[None], position_ids=positions[None], **cache).logits[0].float().cpu()

    with contextlib.suppress(Exception):  # what wants another cache runs without one
        return computed(past_key_values=Before(config=model.config), use_cache=True)
    try:
        return computed(use_cache=False)
    except Exception as error:
        raise NoReference(f"{type(error).__name__}: {str(error).strip()[:200]}") from error


@contextlib.contextmanager
def _attention_of(model: Any, name: str) -> Iterator[None]:
    """transformers' own attention, looked up by name in each call."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}
    for module in model.modules():
        own = getattr(module, "config", None)
        if hasattr(own, "_attn_implementation"):
            configs[id(own)] = own
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
