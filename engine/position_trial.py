"""Whether a model is computed rightly over the whole context that is served: tried at start, on excerpts of it.

1. `take_reference`, before anything is changed in the model: excerpts of a few tokens lie at the context's beginning,
   across every length that the configuration names (the original context of a rotary scaling, a window, a chunk, the
   floor of a temperature scale), and at the context limit (engine/trial_places.py). Each runs alone through
   transformers' own attention, behind a cache that says how many tokens came before it, and holds some of them: made
   up, not computed (engine/made_up.py). Where keys and values are kept in 8 bits, that cache gives back what is kept.
2. `disagreement` runs all of them through a Forward as the engine would: packed in one step, whatever their positions,
   behind the same made-up keys and values in blocks, then on behind what it has written itself, the last token as a
   decode.
3. Each layer is given what it was given in the reference, and compared by itself (engine/layer_taps.py). In a narrow
   type it is compared with what it makes of that in float32, from which transformers' own rounding leads away, too: how
   far is known for each row, and so is what we may be off. Where layers cannot be looked at, logits are compared, and
   what rounding does to them hides more.

So it sees what looks at absolute positions, at the largest position of a batch, or at the row of a packed step; where
a window or a chunk ends; and what an attention does beside the products that we compute (sinks, soft caps). A faster
path that fails gives way to a slower one; if the slowest fails, the model is refused, with the context limit that
would do if there is one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from engine.attention.interface import Chunk, StateUse
from engine.forward import Forward
from engine.kv_rounding import rounded
from engine.kv_shape import KvShape
from engine.layer_taps import Tapped, in_float32, rows, tapped
from engine.made_up import SLOTS, MadeUp, Placed
from engine.model_errors import ModelLoadError, meant_for_people
from engine.model_probe import LayerSeen
from engine.trial_places import STEPS, Place, named_lengths, places
from kv_transfer.layout import Rounding

# What is allowed, as a share of what a layer adds to the stream, or of the logits' deviation; of the median row.
_EXACT = {torch.float32: 1e-3}
# In narrow types we are held against the layer in float32: as far from it as so many times transformers' own rounding,
_LAYER_ROUNDINGS, _LAYER_LEAST, _LAYER_MOST = 2.5, 4e-3, 2e-1
# or against its logits: as far as two of transformers' own ways of computing attention are from each other.
_ROUNDINGS, _LEAST, _MOST = 4.0, 2e-2, 2e-1
_FEW_ROWS = 8  # so few may be led elsewhere by rounding (to another expert): then the median layer counts
_HARD_HIT = 0.9  # the quantile of rows
_PACKED_TOKENS = 1 << 15  # of padded context in one step
_EMBEDDING, _LOGITS = "embedding", "logits"
Part = int | str  # a layer's number, or one of these

log = logging.getLogger(__name__)


class NoReference(Exception):
    """The model does not run with transformers' own attention; the message says why."""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """`logits` [tokens, vocabulary] float32, on the CPU; `layers`: as transformers computes them, maybe none.

    Of a narrow type the layers' outputs and `head`, the logits of the last layer's, are computed in float32 from the
    inputs that the layers got in the narrow one; `rounding` says how far from these transformers' own are, by part and
    row. It is empty where that is not known.
    """

    place: Place
    tokens: tuple[int, ...]
    logits: torch.Tensor
    layers: Tapped
    head: torch.Tensor
    rounding: Mapping[Part, torch.Tensor] = field(default_factory=dict[Part, torch.Tensor])


@dataclass(frozen=True, slots=True)
class Reference:
    """`allowed_through`: for logits through all layers; `kinds`: layers whose attention is alike have one; `exact`: in
    a type in which rounding tells nothing; `original`: the context beyond which a sequence has another rotary table
    (engine/longrope.py), 0: none.
    """

    excerpts: tuple[Excerpt, ...]
    made: MadeUp
    allowed_through: float
    kinds: Mapping[int, Any]
    exact: bool
    original: int = 0

    def within(self, limit: int) -> Reference:
        found = tuple(e for e in self.excerpts if e.place.end <= limit)
        return replace(self, excerpts=found)


@dataclass(frozen=True, slots=True)
class Off:
    """Of a part: how far it is off, and what is allowed."""

    part: Part
    by: float
    allowed: float

    @property
    def ratio(self) -> float:
        return self.by / self.allowed

    def __str__(self) -> str:
        what = f"layer {self.part}" if isinstance(self.part, int) else f"the {self.part}"
        return f"{what} is off by {self.by:.2g} of its size, and {self.allowed:.2g} is rounding"


class Verdicts:
    """What was tried and what came of it, for the log and `diptych status`."""

    def __init__(self, model: str, reference: Reference) -> None:
        self._model = model
        self._where = _listed(sorted({e.place.first for e in reference.excerpts}))
        self._said: list[str] = []

    def no(self, path: str, why: str) -> None:
        """A path that does not serve, while a slower one may."""
        self._said.append(f"{path}: no, {why}")
        log.info("%s does not run on %s: %s", self._model, path, why)

    def yes(self, path: str) -> None:
        self._said.insert(0, f"{path}: right at positions {self._where}")
        log.info("%s on %s: right at positions %s", self._model, path, self._where)

    def __str__(self) -> str:
        return "; ".join(self._said)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def take_reference(
    model: Any,
    described: Mapping[str, Any],
    dtype: torch.dtype,
    limit: int,
    layers: Sequence[LayerSeen] = (),
    original: int = 0,
    rounding: Rounding = "",
) -> Reference:
    """Raises NoReference, and ModelLoadError. `described`: the checkpoint's config.json; `limit`: the context that is
    served; `layers`: what is known of them: without it nothing is made up; `original`: as a Reference has it;
    `rounding`: of keys and values, in transformers' cache as in our pools.
    """
    _check_told(model)
    made = MadeUp(layers, rounding)
    rules = tuple({seen.rule: None for seen in layers if not seen.rule.state})
    lengths, ends = named_lengths(described, limit), (original, original + 1) if original else ()
    beginning = _excerpt(model, places(limit, lengths, rules, holds=False)[0], made, see=True)
    holds = made.fits()
    excerpts = (beginning,)
    for holding in (True, False) if holds else (False,):
        try:
            others = [_excerpt(model, place, made) for place in places(limit, lengths, rules, ends, holds=holding)[1:]]
        except NoReference as error:
            if not holding:
                raise
            log.info("%s is tried without made-up keys and values: %s", type(model).__name__, error)
            continue
        excerpts = (beginning, *others)
        break
    kinds = {seen.layer: seen.kept for seen in layers}
    if dtype in _EXACT:
        return Reference(excerpts, made, _EXACT[dtype], kinds, True, original)
    # Paths whose layers cannot be looked at serve models whose layers all look at everything.
    looked_at = beginning.layers.usable and any(rule.leaves for rule in rules)
    through = _MOST if looked_at else _roundings(model, excerpts, made)
    return Reference(_beside_float32(model, excerpts, made), made, through, kinds, False, original)


def _check_told(model: Any) -> None:
    """Some models are not told positions when they generate, and count them from another number on. Raises
    ModelLoadError.
    """
    embedding = model.get_input_embeddings().weight
    count = min(_FEW_ROWS, len(embedding))
    tokens = torch.arange(count, device=embedding.device)
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    if padding is not None:  # it may not be counted
        tokens[tokens == padding] = count - 1
    with torch.no_grad(), _attention_of(model, "eager"):
        try:
            told, untold = (
                model(input_ids=tokens[None], use_cache=False, **positions).logits[0].float()
                for positions in ({"position_ids": torch.arange(count, device=tokens.device)[None]}, {})
            )
        except Exception:  # whatever is wrong with it, the reference says so
            return
    if (told - untold).square().mean().sqrt() > _LEAST * untold.std():
        raise ModelLoadError(
            f"{type(model).__name__} cannot be served: it counts positions by itself when it generates, and otherwise "
            "than from 0 on; choose another model"
        )


def _beside_float32(model: Any, excerpts: Sequence[Excerpt], made: MadeUp) -> tuple[Excerpt, ...]:
    """With what rounding does to each layer of each of them."""
    if not all(e.layers.usable for e in excerpts):
        return tuple(excerpts)
    found: list[Excerpt] = []
    try:
        with in_float32(model):
            for e in excerpts:
                wide = _excerpt(model, e.place, made, replaced=e.layers.inputs)
                against = replace(e, layers=Tapped(e.layers.inputs, wide.layers.outputs), head=wide.logits)
                found.append(replace(against, rounding=_rows_off(against, e.layers, e.logits)))
    except NoReference as error:
        log.info("%s does not run in float32, so little is known of its rounding: %s", type(model).__name__, error)
        return tuple(excerpts)
    return tuple(found)


def _roundings(model: Any, excerpts: Sequence[Excerpt], made: MadeUp) -> float:
    """What is allowed of the logits through all layers."""
    ends = (excerpts[0], excerpts[-1])
    off = [_through(_excerpt(model, e.place, made, attention="sdpa").logits, e).by for e in ends]
    return min(_MOST, max(_LEAST, _ROUNDINGS * max(off)))


def disagreement(forward: Forward, reference: Reference, shape: KvShape, device: Any) -> str:
    """What `forward` computes otherwise, and where; "" if nothing."""
    for pack in _packs(reference.excerpts):
        for excerpt, off in zip(pack, offs(forward, pack, reference, shape, torch.device(device)), strict=True):
            if not off.ratio <= 1.0:  # a NaN is no agreement
                last = excerpt.place.end - 1
                return f"at positions {excerpt.place.first} to {last} it differs from transformers': {off}"
    return ""


def offs(
    forward: Forward, excerpts: Sequence[Excerpt], reference: Reference, shape: KvShape, device: torch.device
) -> list[Off]:
    """The worst of each excerpt, computed together."""
    if hasattr(forward, "tapped") and all(e.layers.usable for e in excerpts):
        logits, taps = _computed(forward, excerpts, reference, shape, device, by_layer=True)
        if all(ours.outputs.keys() == e.layers.outputs.keys() for ours, e in zip(taps, excerpts, strict=True)):
            return [_by_itself(reference, *one) for one in zip(excerpts, taps, logits, strict=True)]
    logits, _ = _computed(forward, excerpts, reference, shape, device, by_layer=False)
    allowed = reference.allowed_through
    return [_through(ours, e, allowed) for ours, e in zip(logits, excerpts, strict=True)]


def _packs(excerpts: Sequence[Excerpt]) -> list[list[Excerpt]]:
    """All in one step, where attention pads no context to too much; if not, long ones beside short ones."""
    left = sorted(excerpts, key=lambda e: e.place.past.held)
    packs: list[list[Excerpt]] = []
    while left:
        longest = left.pop()
        count = max(1, _PACKED_TOKENS // (longest.place.past.held + 1) - 1)
        packs.append([*left[:count], longest])
        left = left[count:]
    return packs


def _computed(
    forward: Any,
    excerpts: Sequence[Excerpt],
    reference: Reference,
    shape: KvShape,
    device: torch.device,
    *,
    by_layer: bool,
) -> tuple[list[torch.Tensor], list[Tapped]]:
    """Of each: logits [tokens, vocabulary] float32 on the CPU; with `by_layer` also its layers, which are then given
    what they got in the reference.
    """
    placed = Placed(reference.made, shape, [e.place.past for e in excerpts], device)
    has_state = any(group.rule.state for group in shape.groups)
    logits: list[list[torch.Tensor]] = [[] for _ in excerpts]
    layers = [Tapped() for _ in excerpts]
    spans = [(e.place.first, e.place.end) for e in excerpts]
    with torch.inference_mode(), getattr(forward, "only_positions", contextlib.nullcontext)(spans):
        for step in range(STEPS):
            chunks: list[Chunk] = []
            tokens: list[int] = []
            positions: list[int] = []
            given: list[tuple[int, slice, slice]] = []  # excerpt, its rows, and those of the packed row
            for n, excerpt in enumerate(excerpts):
                done, end = excerpt.place.rows()[step]
                new = excerpt.tokens[done:end]
                if not new:
                    continue
                start = excerpt.place.past.held + done
                table, *others = placed.tables(n, start)
                state = _slots(n, step) if has_state else None
                chunks.append(Chunk(len(tokens), len(new), start, table, tuple(others), state))
                first = excerpt.place.first + (reference.original if excerpt.place.end > reference.original else 0)
                positions += range(first + done, first + end)
                given.append((n, slice(done, end), slice(len(tokens), len(tokens) + len(new))))
                tokens += new
            if not chunks:
                break
            with contextlib.ExitStack() as stack:
                ours = Tapped()
                if by_layer:
                    inputs = {
                        layer: torch.cat([excerpts[n].layers.inputs[layer][..., own, :] for n, own, _ in given], dim=-2)
                        for layer in excerpts[0].layers.inputs
                    }
                    ours = stack.enter_context(forward.tapped(inputs))
                found = forward.forward(placed.pool, tokens, positions, chunks, list(range(len(tokens)))).float().cpu()
            for n, _, packed in given:
                logits[n].append(found[packed])
                layers[n].append(ours, packed)
    return [torch.cat(parts) for parts in logits], layers


def _slots(excerpt: int, step: int) -> StateUse:
    """Two for each excerpt, in turn."""
    first = excerpt * SLOTS
    return StateUse(first + (step - 1) % SLOTS if step else -1, first + step % SLOTS)


def servable_limit(
    forward: Forward, reference: Reference, shape: KvShape, device: Any, described: Mapping[str, Any], limit: int
) -> int | None:
    """The longest named length up to which `forward` agrees, if there is one."""
    for length in reversed(named_lengths(described, limit)):
        part = reference.within(length)
        if part.excerpts and not disagreement(forward, part, shape, device):
            return length
    return None


def _through(logits: torch.Tensor, excerpt: Excerpt, allowed: float = 1.0) -> Off:
    """Of the step that is furthest off, its median row: a fault may show behind the cached beginning only."""
    off = (logits - excerpt.logits).square().mean(-1).sqrt() / excerpt.logits.std()
    return Off(_LOGITS, max(off[a:b].median().item() for a, b in excerpt.place.rows() if a < b), allowed)


def _rows_off(excerpt: Excerpt, ours: Tapped, logits: torch.Tensor) -> dict[Part, torch.Tensor]:
    """By part: how far each row is off, [tokens]."""
    theirs = excerpt.layers
    found: dict[Part, torch.Tensor] = {}
    for number, layer in enumerate(theirs.outputs):
        before, after = rows(theirs.inputs[layer]), rows(theirs.outputs[layer])
        if not number:
            found[_EMBEDDING] = _far(rows(ours.inputs[layer]), before, before)
        added = after - before if after.shape == before.shape else after
        found[layer] = _far(rows(ours.outputs[layer]), after, added)
    found[_LOGITS] = _far(logits, excerpt.head, excerpt.head - excerpt.head.mean())
    return found


def _far(a: torch.Tensor, b: torch.Tensor, measure: torch.Tensor) -> torch.Tensor:
    size = measure.square().mean(-1).sqrt().median()
    return ((a.to(b.device) - b).square().mean(-1).sqrt() / size).cpu()


def _by_itself(reference: Reference, excerpt: Excerpt, ours: Tapped, logits: torch.Tensor) -> Off:
    """The part that is furthest off: of the median row of a step. Where a step has few rows, rounding may lead most of
    them elsewhere; then of the median among layers of one kind, too.
    """
    off = _rows_off(excerpt, ours, logits)
    found: list[Off] = []
    for start, end in excerpt.place.rows():
        if start == end:
            continue
        by_kind: dict[Any, list[Off]] = {}
        for part, each in off.items():
            # The head looks at each row alone, behind our own last layer, which in narrow types may send a row to other
            # experts than transformers does: most rows of the excerpt tell what the head does.
            of_it = slice(None) if part == _LOGITS and not reference.exact else slice(start, end)
            one = Off(part, each[of_it].median().item(), _allowed(reference, excerpt, part, of_it))
            kind = reference.kinds.get(part) if isinstance(part, int) else part
            by_kind.setdefault(kind, []).append(one)
        for alike in by_kind.values():
            # A NaN comes first.
            alike.sort(key=lambda o: (o.ratio == o.ratio, -o.ratio))
            found.append(alike[0] if reference.exact or end - start >= _FEW_ROWS else alike[len(alike) // 2])
    return max(found, key=lambda o: (o.ratio != o.ratio, o.ratio))


def _allowed(reference: Reference, excerpt: Excerpt, part: Part, rows: slice) -> float:
    """Of the median of these rows of a part."""
    if reference.exact:
        return reference.allowed_through
    if part not in excerpt.rounding:
        return _LAYER_MOST
    each, times = excerpt.rounding[part], _ROUNDINGS if part == _LOGITS else _LAYER_ROUNDINGS
    own = each[rows]
    # Of few rows each may be one of those that rounding hits hard, and not the same ones as in transformers.
    rounding = max(own.median(), each.median() if len(own) >= _FEW_ROWS else each.quantile(_HARD_HIT)).item()
    return min(_LAYER_MOST, max(_LAYER_LEAST, times * rounding))


def _excerpt(
    model: Any,
    place: Place,
    made: MadeUp,
    *,
    attention: str = "eager",
    see: bool = False,
    replaced: Mapping[int, torch.Tensor] | None = None,
) -> Excerpt:
    """What transformers' own attention makes of an excerpt, alone; with `see` `made` gets to know the layers. Raises
    NoReference.
    """
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(place.first + place.past.held)
    tokens = torch.randint(embedding.shape[0], (place.past.num_tokens,), generator=generator)
    positions = torch.arange(place.first, place.end, device=embedding.device)

    def computed(**cache: Any) -> Excerpt:
        with torch.no_grad(), _attention_of(model, attention), tapped(model, replaced) as layers:
            answer = model(input_ids=tokens[None].to(positions.device), position_ids=positions[None], **cache)
        layers.check(len(tokens))
        logits = answer.logits[0].float().cpu()
        return Excerpt(place, tuple(tokens.tolist()), logits, layers, logits)

    try:
        return computed(past_key_values=_cache(model, place, made, see=see), use_cache=True)
    except Exception as error:
        if not place.past.held:  # what wants another cache runs without one
            with contextlib.suppress(Exception):
                return computed(use_cache=False)
        log.debug("a reference of %s at %d", type(model).__name__, place.first, exc_info=True)
        raise NoReference(
            f"transformers' own code does not compute a few tokens of it{meant_for_people(error)}"
        ) from error


def _cache(model: Any, place: Place, made: MadeUp, *, see: bool) -> Any:
    from transformers import DynamicCache

    first, past = place.first, place.past

    class Before(DynamicCache):
        """Says that `first` tokens came before, and has the last `held` of them, of which none was computed; recurrent
        layers begin with nothing.
        """

        def get_seq_length(self, *_: Any, **__: Any) -> int:
            return first

        def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
            return past.held + query_length, first - past.held

        def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
            if see:
                made.see(layer, key, value)
            return rounded(made.rounding, *made.before(layer, key, value, past.held, past.loud))

        def update_indexer(self, key: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return key

    return Before(config=model.config)


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
