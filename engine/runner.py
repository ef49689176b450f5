"""The model runner: one plan in, one forward pass, one sampling, tokens out.

Owns the KV memory: a pool for each group of the layout, contiguous, so that a block is one transfer descriptor. It is
allocated once and stays mapped for the life of the process: peers read it.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from engine.adapters.choose import adapter_layers, look_at_layers, read_adapters
from engine.adapters.layers import adapting, shapes_of
from engine.attention.choose import AttentionChoiceError, AttentionShape, pick_backend
from engine.attention.gather import GatherBackend
from engine.attention.grouped import GroupedBackend
from engine.attention.interface import AttentionBackend, Chunk, register
from engine.attention.invariant import InvariantBackend
from engine.attention.native import NativeBackend
from engine.config import EngineConfig
from engine.draft_plans import DraftLimits
from engine.experts.choose import group_experts
from engine.forward import Arriving, Forward, TorchForward
from engine.fused.choose import fused_model
from engine.given_back import give_back
from engine.graphs import CudaRecorder, GraphForward
from engine.invariance_trial import trial_of_invariance
from engine.invariant_linear import TILE_ROWS, NotInvariantError, make_linears_invariant
from engine.kv_rounding import rounding_of
from engine.kv_shape import KvShape, copied, parts
from engine.model_errors import ModelLoadError, RankLost
from engine.model_loader import ModelFacts, Trial, load_model
from engine.native.build import NativeBuildError
from engine.native.choose import Building, native_attention, native_stack
from engine.native.layers import use_native_layers
from engine.native.library import Library
from engine.native.processors import ProcessorsError, chosen
from engine.native.stack import NativeStack
from engine.pool_sizes import blocks_by_group
from engine.position_trial import Reference, Verdicts, disagreement, servable_limit
from engine.prediction_head import check_head, drafter_of
from engine.quantization import quantized, scheme_of
from engine.ranks.joined import load_of_all
from engine.ranks.leader import Leader, Led
from engine.ranks.member import Member
from engine.sampler import CAUSES, NO_CHANCE, Drawn, Sampler
from engine.scoring import Scoring
from engine.types import DraftPass, Failed, PlanItem, Sampled, StepPlan, StepResult
from engine.verify import Verification
from kv_transfer.handoff import TokenLogprobs
from kv_transfer.layout import GONE
from kv_transfer.transport import KvArea, KvMemory
from settings.cache import writable_cache
from settings.phases import phase
from settings.processors import usable

log = logging.getLogger(__name__)


class ModelRunner:
    """Raises ModelLoadError, with cause and fix, for whatever cannot be served."""

    def __init__(self, config: EngineConfig, member: Member | None = None) -> None:
        """`member`: this process is another rank than the first, and follows (engine/ranks)."""
        # Of its own torch counts what affinity leaves, but no quota.
        share = max(1, min(torch.get_num_threads(), usable()) // config.tensor_parallel)
        torch.set_num_threads(config.threads or share)
        self.device = device_of(config, 0 if member is None else member.place.rank)
        self.leader: Leader | None = None
        if config.tensor_parallel > 1 and member is None:
            phase("starting the ranks")
            self.leader = Leader(config, self.device)
        try:
            self._load(config, self.leader or member)
        except RankLost as lost:
            why = lost if self.leader is None else self.leader.explained(lost)
            raise ModelLoadError(f"the model cannot be loaded over {config.tensor_parallel} ranks: {why}") from lost
        finally:
            if self.leader is not None and not hasattr(self, "kv"):
                self.leader.close()

    def _load(self, config: EngineConfig, ranks: Leader | Member | None) -> None:
        if self.device.type == "cuda":
            _keep_compiled_kernels()
        building = Building() if self.device.type == "cpu" and config.kernels != "torch" else None
        register()
        adapters = self.adapters = read_adapters(config)
        check_head(config)
        phase("loading the model")
        model, self.facts, trial = load_model(
            config.model,
            config.dtype,
            self.device,
            config.context_limit_tokens,
            ranks,
            scheme_of(config.quantization, config.quantized_groups),
            rounding_of(config.kv_dtype),
        )
        if ranks is not None:
            _check_alike(self.facts, ranks)
        library = None if building is None else _library(config, building)
        shapes = shapes_of(model) if config.adapters.enabled else {}
        self.expert_load = group_experts(model, library)  # None: a model without experts
        if ranks is not None:
            self.expert_load = load_of_all(model, self.expert_load, ranks.place)
        self.family = type(model).__name__
        self.verdicts = Verdicts(self.facts.name, trial.reference)
        self.block_tokens = config.block_tokens
        self._groups = self.facts.own_groups or self.facts.groups
        self.shape = KvShape(self._groups, config.block_tokens)
        self.forward: Forward = _forward(
            config, model, self.facts, self.shape, self.device, library, trial, self.verdicts
        )
        self.adapter_layers = adapter_layers(config, adapters, model, shapes, self._groups)
        self._quantized = quantized(model)
        if self._quantized is not None:
            self._quantized.packed(self.forward.name)
        self._draft = drafter_of(config, model, self.facts, self.device, library, _forward)
        beside = () if self._draft is None else self._draft.beside(self._groups)
        self.num_blocks = blocks_by_group(config, self.shape, self.device, beside)
        if ranks is not None:
            self.num_blocks = ranks.group.least(self.num_blocks)
            if isinstance(ranks, Leader):
                self.forward = Led(self.forward, ranks)
                ranks.wait_until_ready()
        self.kv = self.shape.pool(self.num_blocks, self.device)
        if self._draft is not None:
            self._draft.begin(self.num_blocks)
        self._further = self._groups[1:]
        self._first_ids = [0, *itertools.accumulate(self.num_blocks)]
        self.generations = np.zeros(sum(self.num_blocks), dtype=np.uint64)
        self._sampler = Sampler(self.facts.vocab_size)
        self.tokens_on_host = self.device.type == "cpu"  # as soon as they are sampled
        self._newest: LaunchedStep | None = None  # whose tokens the next step may begin with
        if isinstance(self.forward, NativeStack):  # it has the weights packed
            give_back()
        if self.adapter_layers is not None:
            look_at_layers(self.adapter_layers, self.execute, self._first_ids)
            self.forget()

    @property
    def block_bytes(self) -> int:
        """Of the first group."""
        return self.block_bytes_by_group[0]

    @property
    def block_bytes_by_group(self) -> tuple[int, ...]:
        return tuple(group.block_bytes(self.block_tokens) for group in self._groups)

    def close(self) -> None:
        """Ends the other ranks, if there are any."""
        if self.leader is not None:
            self.leader.close()

    def describe_device(self) -> str:
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        bound = self.forward.cpus if isinstance(self.forward, NativeStack) else ()
        on = f" on processors {','.join(map(str, bound))}" if bound else ""
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return f"{self.device}{name} {self.facts.dtype}{threads}{on}"

    def describe_path(self) -> str:
        """What computes, and how the weights are quantized, here or by the checkpoint; what drafts."""
        drafts = "" if self._draft is None else f"drafts by {self._draft}"
        parts_of_it = (self.forward.name, self._quantized or "", self.adapter_layers or "", drafts)
        return ", ".join(str(part) for part in parts_of_it if part)

    @property
    def draft_limits(self) -> DraftLimits | None:
        """None: no model drafts."""
        return None if self._draft is None else self._draft.limits

    def memory(self) -> KvMemory:
        return KvMemory(
            areas=tuple(
                KvArea(pool.data_ptr(), pool[0].numel() * pool.element_size(), len(pool)) for pool in parts(self.kv)
            ),
            device=str(self.device) if self.device.type == "cpu" else f"cuda:{self.device.index or 0}",
            generations=self.generations,
            read_block=self._read_block,
        )

    def _read_block(self, block_id: int) -> memoryview:
        group = bisect.bisect_right(self._first_ids, block_id) - 1
        block = parts(self.kv)[group][block_id - self._first_ids[group]]
        return memoryview(block.reshape(-1).view(torch.uint8).cpu().numpy())  # type: ignore[arg-type]

    def execute(self, plan: StepPlan) -> StepResult:
        """Computes the plan's tokens, writes their KV, samples where asked. Returns when the device is done."""
        return self.launch(plan).wait()

    def improve(self) -> bool:
        """For when there is nothing to do: makes later steps quicker, a moment's work. False: nothing is left."""
        improve = getattr(self.forward, "improve", None)
        with torch.inference_mode():
            return (improve is not None and improve(self.kv)) or (self._draft is not None and self._draft.improve())

    def forget(self) -> None:
        """What is kept from step to step, after one that failed: it is made again from the plans to come."""
        self._newest = None
        self._sampler.forget()

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Begins the step; on CUDA it computes while the host goes on. Steps run and are waited for in order.

        Items that follow one of the step before get its token on the device. That step's sampling is launched now at
        the latest: late, so that what of it waits for the device holds up nobody who waits for an earlier step.
        """
        before, self._newest = self._newest, None
        if before is not None:
            before.draw()
        with torch.inference_mode():
            found, passes = (plan.items, ()) if self._draft is None else self._draft.draft(plan.items)
        order = sorted(range(len(found)), key=lambda i: _turn(found[i]))
        items = [found[i] for i in order]
        token_ids, positions, chunks, last_rows = _pack(items, self.facts.original_context_tokens)
        if self._further:
            chunks = [self._in_groups(chunk, item) for chunk, item in zip(chunks, items, strict=True)]
        arriving = None
        following = [(last_rows[i], item.follows) for i, item in enumerate(items) if item.follows is not None]
        if following:
            assert before is not None, "nothing was launched before"
            arriving = before.arriving(following)
            if self.tokens_on_host:
                known = arriving.tokens[list(arriving.sources)].tolist()
                for row, token in zip(arriving.rows, known, strict=True):
                    token_ids[row] = token
                arriving = None
        sampled = [i for i, item in enumerate(items) if item.sample]
        keep = [row for i in sampled for row in range(last_rows[i] - len(items[i].drafts), last_rows[i] + 1)]
        scoring = Scoring.of(items, order, last_rows)
        keep = (keep or [len(token_ids) - 1]) + ([] if scoring is None else scoring.rows)
        with torch.inference_mode(), adapting(self.adapter_layers, items):
            logits = self.forward.forward(copied(self.kv, chunks), token_ids, positions, chunks, keep, arriving)
            if self._draft is not None:
                self._draft.keep(items)
            logits = logits if scoring is None else scoring.launch(logits)
        places = [order[i] for i in sampled]
        step = LaunchedStep(self._sampler, logits, [items[i] for i in sampled], places, len(items), passes, scoring)
        step.drafts_over = bool(self._draft and self._draft.over)
        self._newest = step
        return step

    def _in_groups(self, chunk: Chunk, item: PlanItem) -> Chunk:
        """With its tables and slots in the groups after the first, by each pool's own numbers."""
        others: list[list[int]] = []
        state = None
        for group, table, base in zip(self._further, item.others, self._first_ids[1:], strict=False):
            if group.rule.state:
                others.append([])
                state = item.state and item.state.shifted(base)
                continue
            first = group.rule.first_block(item.start, self.block_tokens)
            others.append([GONE] * first + [block - base for block in table[first:]])
        return replace(chunk, others=tuple(others), state=state)


class LaunchedStep:
    """`places` of `items` in the plan; `logits` has a row for each and each draft, or one that is only waited for."""

    def __init__(
        self,
        sampler: Sampler,
        logits: torch.Tensor,
        items: list[PlanItem],
        places: list[int],
        count: int,
        passes: Sequence[DraftPass] = (),
        scoring: Scoring | None = None,
    ) -> None:
        self._sampler = sampler
        self._logits: torch.Tensor | None = logits
        self._items = items
        self._places = places
        self._count = count
        self._passes = passes
        self._scoring = scoring
        self.drafts_over = False
        self._drawn: Drawn | None = None
        self._verification: Verification | None = None

    def draw(self) -> Drawn:
        """Launches the sampling, once. A step that samples nothing has its only row drawn from, to wait for."""
        if self._drawn is None:
            assert self._logits is not None
            with torch.inference_mode():
                if any(item.drafts for item in self._items):
                    self._verification = Verification(self._sampler, self._logits, self._items)
                    self._drawn = self._verification.drawn
                elif self._items:
                    self._drawn = self._sampler.draw(self._logits, self._items)
                else:
                    self._drawn = Drawn(1, self._logits[:, 0].long(), None)
            self._logits = None
        return self._drawn

    def arriving(self, following: Sequence[tuple[int, int]]) -> Arriving:
        """(row, item of this step's plan): the item's token goes to that row of the next step."""
        drawn = self.draw()
        assert self._verification is None, "what follows a verification is planned after it"
        row_of = {place: row for row, place in enumerate(self._places)}
        return Arriving([row for row, _ in following], [row_of[place] for _, place in following], drawn.tokens)

    def wait(self) -> StepResult:
        """When the device has written the KV and sampled: announced blocks must be written, not launched."""
        result = replace(self._sampled(), drafts_over=True) if self.drafts_over else self._sampled()
        return result if self._scoring is None else self._scoring.added_to(result)

    def _sampled(self) -> StepResult:
        drawn = self.draw()
        if self._verification is not None:
            return self._verified(self._verification)
        found, logprobs = drawn.read()
        tokens: list[int | None] = [None] * self._count
        result_logprobs: list[TokenLogprobs | None] = [None] * self._count
        failures: dict[int, Failed] = {}
        if self._items:
            for item, place, token, logprob in zip(self._items, self._places, found, logprobs, strict=True):
                if token < 0:
                    failures[place] = _failed(token, item.position)
                    continue
                tokens[place] = token
                result_logprobs[place] = logprob
        return StepResult(tuple(tokens), tuple(result_logprobs), failures, passes=self._passes)

    def _verified(self, verification: Verification) -> StepResult:
        tokens: list[int | None] = [None] * self._count
        logprobs: list[TokenLogprobs | None] = [None] * self._count
        failures: dict[int, Failed] = {}
        further: dict[int, list[Sampled]] = {}
        with torch.inference_mode():
            found = verification.read()
        for item, place, own in zip(self._items, self._places, found, strict=True):
            if own[0][0] < 0:
                failures[place] = _failed(own[0][0], item.position)
                continue
            tokens[place], logprobs[place] = own[0]
            if own[1:]:
                further[place] = own[1:]
        return StepResult(tuple(tokens), tuple(logprobs), failures, further, self._passes)


def _failed(cause: int, position: int) -> Failed:
    return Failed(CAUSES[cause].format(position), ours=cause != NO_CHANCE)


def _turn(item: PlanItem) -> tuple[bool, bool, int]:
    """Decodes first, as backends count them; what is scored behind what is sampled; those of one adapter together."""
    is_decode = len(item.token_ids) == 1 and item.start > 0
    return not is_decode, item.prompt_logprobs is not None, -1 if item.adapter is None else item.adapter.slot


def _pack(items: Sequence[PlanItem], original: int = 0) -> tuple[list[int], list[int], list[Chunk], list[int]]:
    """Token ids and positions of the packed row; the chunks in it; each item's last row. `original`: by how much the
    positions of long sequences are moved up (engine/longrope.py).
    """
    token_ids: list[int] = []
    positions: list[int] = []
    chunks: list[Chunk] = []
    last_rows: list[int] = []
    for item in items:
        count = len(item.token_ids)
        chunks.append(Chunk(len(token_ids), count, item.start, list(item.block_ids), copies=item.copies))
        token_ids += item.token_ids
        first = item.start + original if item.long else item.start
        positions += range(first, first + count)
        last_rows.append(len(token_ids) - 1)
    return token_ids, positions, chunks, last_rows


def device_of(config: EngineConfig, rank: int) -> torch.device:
    """Of a rank: on CUDA one of its own. Raises ModelLoadError."""
    device = _device(config.device)
    if device.type != "cuda" or config.tensor_parallel == 1:
        return device
    count = torch.cuda.device_count()
    if config.tensor_parallel > count:
        raise ModelLoadError(
            f"engine.tensor_parallel is {config.tensor_parallel} and torch sees {count} CUDA devices; each rank needs "
            "one of its own, so lower it, or give the worker more"
        )
    return torch.device("cuda", rank)


def _check_alike(facts: ModelFacts, ranks: Leader | Member) -> None:
    """All ranks must have parts of one model. Raises ModelLoadError, on every rank."""
    others = ranks.group.differing(repr((facts.identity, facts.groups, facts.dtype, facts.context_limit_tokens)))
    if others:
        raise ModelLoadError(
            f"rank {', '.join(map(str, others))} has read other weights of {facts.name} than rank 0; start the worker "
            "again when nobody writes to its directory any more"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelLoadError(f"engine.device is {name} and torch sees no CUDA device; use cpu or auto")
    return torch.device(name)


def _keep_compiled_kernels() -> None:
    """Where libraries that compile at run time find them again after a restart, unless told otherwise."""
    for variable, name in (("TRITON_CACHE_DIR", "triton"), ("FLASHINFER_WORKSPACE_BASE", "flashinfer")):
        if variable not in os.environ:
            with contextlib.suppress(OSError):  # then the libraries' own choice
                os.environ[variable] = str(writable_cache(name))


def _forward(
    config: EngineConfig,
    model: Any,
    facts: ModelFacts,
    kv_shape: KvShape,
    device: torch.device,
    library: Library | None,
    trial: Trial,
    verdicts: Verdicts,
) -> Forward:
    alone = config.tensor_parallel == 1
    apart = config.adapters.enabled  # layers stay layers, for adapters to add to
    stepwise = apart or config.speculation.method == "mtp"  # which the last norm is looked at for
    if library is not None and kv_shape.is_plain and alone and not stepwise and config.attention in ("auto", "native"):
        stack = native_stack(library, model, kv_shape, facts.extras, facts.context_limit_tokens, trial.reference)
        if isinstance(stack, NativeStack):
            verdicts.yes(stack.name)
            return stack
        verdicts.no("native stack", stack)
    if config.batch_invariant and any(group.rule.state for group in facts.groups):
        raise ModelLoadError(
            f"{facts.name} has recurrent layers, whose results depend on where a prompt is cut; set "
            "engine.batch_invariant to false"
        )
    if config.speculation.method != "off" and any(group.rule.state for group in facts.groups):
        raise ModelLoadError(
            f"{facts.name} has recurrent layers, whose state cannot go back to before drafts that were rejected; set "
            "engine.speculation.method to off"
        )
    shapes = [
        None
        if group.rule.state or not facts.heads
        else AttentionShape.of(group, facts.heads, config.block_tokens, facts.extras)
        for group in kv_shape.groups
    ]
    if config.batch_invariant:
        return _tried(_invariant(model, facts, kv_shape, shapes), facts, kv_shape, device, trial, verdicts)
    if library is not None:
        use_native_layers(model, library, blocks=not apart)
    phase("trying attention kernels")
    backends = [None if s is None else _backend(config, facts, s, device, library) for s in shapes]
    eager = _eager(config, model, facts, kv_shape, shapes, backends, device, trial, verdicts)
    if not kv_shape.is_plain or stepwise:
        return eager
    if device.type == "cuda" and alone and config.kernels != "torch" and not facts.extras:
        eager = _fused(eager, model, facts, kv_shape, trial.reference, verdicts)
    if device.type != "cuda" or not alone or not config.cuda_graphs or not hasattr(eager.backend, "static"):
        return eager
    context_blocks = -(-facts.context_limit_tokens // config.block_tokens)
    return GraphForward(eager, CudaRecorder(device), context_blocks, config.max_running_sequences)


def _eager(
    config: EngineConfig,
    model: Any,
    facts: ModelFacts,
    shape: KvShape,
    shapes: Sequence[AttentionShape | None],
    backends: Sequence[AttentionBackend | None],
    device: torch.device,
    trial: Trial,
    verdicts: Verdicts,
) -> TorchForward:
    """The model's own layers with `backends`, or with gather where these compute otherwise."""
    forward = TorchForward(model, _joined(shape, backends))
    if all(backend is None or type(backend) is GatherBackend for backend in backends):
        return _tried(forward, facts, shape, device, trial, verdicts)
    off = disagreement(forward, trial.reference, shape, device)
    if not off:
        verdicts.yes(forward.name)
        return forward
    if config.attention != "auto" or config.kernels == "native":
        raise ModelLoadError(
            f"{facts.name} would be computed wrongly on {forward.name}: {off}; set engine.attention and "
            "engine.kernels to auto"
        )
    log.warning("%s runs on torch's own attention, which is slower: %s: %s", facts.name, forward.name, off)
    verdicts.no(forward.name, off)
    slower = [None if s is None else GatherBackend(s.rows) for s in shapes]
    return _tried(TorchForward(model, _joined(shape, slower)), facts, shape, device, trial, verdicts)


def _joined(shape: KvShape, backends: Sequence[AttentionBackend | None]) -> Any:
    """What serves all groups."""
    if shape.is_plain:
        return backends[0]
    return GroupedBackend(shape.groups, backends)


def _backend(
    config: EngineConfig, facts: ModelFacts, shape: AttentionShape, device: torch.device, library: Library | None
) -> AttentionBackend:
    """What serves one group. Raises ModelLoadError where kernels are demanded and cannot."""
    if library is not None and config.attention in ("auto", "native"):
        native = native_attention(library, shape)
        if isinstance(native, NativeBackend):
            return native
        if config.kernels == "native" or config.attention == "native":
            raise ModelLoadError(f"{facts.name} cannot run on native kernels: {native}; set engine.kernels to auto")
        log.warning("attention (%s) runs on torch's own operators, which is slower: %s", shape.rule, native)
    try:
        return pick_backend(config.attention, device, shape)
    except AttentionChoiceError as error:
        raise ModelLoadError(str(error)) from error


def _tried(
    forward: TorchForward,
    facts: ModelFacts,
    shape: KvShape,
    device: torch.device,
    trial: Trial,
    verdicts: Verdicts,
) -> TorchForward:
    """The slowest path: what fails here is not served."""
    off = disagreement(forward, trial.reference, shape, device)
    if not off:
        verdicts.yes(forward.name)
        return forward
    limit = servable_limit(forward, trial.reference, shape, device, trial.described, facts.context_limit_tokens)
    fix = "choose another model" if limit is None else f"set engine.context_limit_tokens to at most {limit}"
    raise ModelLoadError(f"{facts.name} would be computed wrongly: {off}; {fix}")


def _fused(
    eager: TorchForward, model: Any, facts: ModelFacts, shape: KvShape, reference: Reference, verdicts: Verdicts
) -> TorchForward:
    assert not isinstance(eager.backend, GroupedBackend), "fused kernels are for plain pools"
    made = fused_model(model, eager.backend, facts.heads, shape, reference)
    if isinstance(made, str):
        verdicts.no("fused layers", made)
        return eager
    fused = TorchForward(made, eager.backend, layers="fused layers")
    verdicts.yes(fused.name)
    return fused


def _library(config: EngineConfig, building: Building) -> Library | None:
    """Our own kernels; raises ModelLoadError where they are demanded and cannot be had."""
    try:
        threads = torch.get_num_threads()
        pins = config.pin_threads if config.tensor_parallel == 1 else "off"  # ranks would meet on the same processors
        phase("compiling the kernels")
        library = building.library(threads, chosen(pins, threads))
    except ProcessorsError as error:
        raise ModelLoadError(str(error)) from None
    except NativeBuildError as error:
        if config.kernels == "native":
            raise ModelLoadError(f"engine.kernels is native, and {error}; or set it to auto or torch") from None
        log.warning("the model runs on torch's own operators, which is slower: %s", error)
        return None
    phase("trying the kernels")
    return library


def _invariant(
    model: Any, facts: ModelFacts, kv_shape: KvShape, shapes: Sequence[AttentionShape | None]
) -> TorchForward:
    """Fixed shapes for every product: what EngineConfig.batch_invariant promises rests on this."""
    try:
        make_linears_invariant(model)
        obstacles = [trial_of_invariance(model, shape) for shape in shapes if shape is not None]
    except NotInvariantError as error:
        raise ModelLoadError(
            f"{facts.name} cannot be served batch-invariantly: {error}; set engine.batch_invariant to false"
        ) from None
    obstacle = next((o for o in obstacles if o is not None), None)
    if obstacle is not None:
        raise ModelLoadError(
            f"torch is not batch-invariant on this machine with {facts.name}: {obstacle}; "
            "set engine.batch_invariant to false"
        )
    backends = [None if shape is None else InvariantBackend(shape.rows) for shape in shapes]
    return TorchForward(model, _joined(kv_shape, backends), TILE_ROWS)
