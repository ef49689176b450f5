"""The model runner: one plan in, one forward pass, one sampling, tokens out.

Owns the KV memory: one tensor [num_blocks, layers, 2, kv_heads, block_tokens, head_dim], contiguous: a block is
one transfer descriptor. It is allocated once and stays mapped for the life of the process: peers read it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.attention.choose import AttentionChoiceError, AttentionShape, pick_backend
from engine.attention.interface import Chunk, register
from engine.attention.invariant import InvariantBackend
from engine.attention.native import NativeBackend
from engine.config import EngineConfig
from engine.forward import Arriving, Forward, TorchForward
from engine.fused.choose import fused_model
from engine.graphs import CudaRecorder, GraphForward
from engine.invariance_trial import trial_of_invariance
from engine.invariant_linear import TILE_ROWS, NotInvariantError, make_linears_invariant
from engine.model_loader import ModelFacts, ModelLoadError, Trial, load_model
from engine.native.build import NativeBuildError
from engine.native.choose import Building, native_attention, native_stack
from engine.native.library import ask_for_large_pages
from engine.native.processors import ProcessorsError, chosen
from engine.native.stack import NativeStack
from engine.position_trial import Reference, disagreement, servable_limit
from engine.sampler import CAUSES, Drawn, Sampler
from engine.types import PlanItem, StepPlan, StepResult
from kv_transfer.handoff import TokenLogprobs
from kv_transfer.transport import KvMemory
from settings.cache import writable_cache
from settings.phases import phase
from settings.processors import usable

log = logging.getLogger(__name__)

_CPU_POOL_BYTES = 1 << 30


class ModelRunner:
    """Raises ModelLoadError, with cause and fix, for whatever cannot be served."""

    def __init__(self, config: EngineConfig) -> None:
        # Of its own torch counts what affinity leaves, but no quota.
        torch.set_num_threads(config.threads or min(torch.get_num_threads(), usable()))
        self.device = _device(config.device)
        if self.device.type == "cuda":
            _keep_compiled_kernels()
        building = Building() if self.device.type == "cpu" and config.kernels != "torch" else None
        register()
        phase("loading the model")
        model, self.facts, trial = load_model(config.model, config.dtype, self.device, config.context_limit_tokens)
        self.forward: Forward = _forward(config, model, self.facts, self.device, building, trial)
        self.block_tokens = config.block_tokens
        self.num_blocks = _num_blocks(config, self.facts, self.device)
        f = self.facts
        shape = (self.num_blocks, f.num_layers, 2, f.num_kv_heads, config.block_tokens, f.head_dim)
        self.kv = zeroed_pool(shape, getattr(torch, f.dtype), self.device)
        self.generations = np.zeros(self.num_blocks, dtype=np.uint64)
        self._sampler = Sampler(self.facts.vocab_size)
        self.tokens_on_host = self.device.type == "cpu"  # as soon as they are sampled
        self._newest: LaunchedStep | None = None  # whose tokens the next step may begin with

    @property
    def block_bytes(self) -> int:
        return self.kv[0].numel() * self.kv.element_size()

    def describe_device(self) -> str:
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        bound = self.forward.cpus if isinstance(self.forward, NativeStack) else ()
        on = f" on processors {','.join(map(str, bound))}" if bound else ""
        return f"{self.device} {self.facts.dtype}{threads}{on}"

    def memory(self) -> KvMemory:
        return KvMemory(
            base_address=self.kv.data_ptr(),
            block_bytes=self.block_bytes,
            num_blocks=self.num_blocks,
            device=str(self.device) if self.device.type == "cpu" else f"cuda:{self.device.index or 0}",
            generations=self.generations,
            read_block=self._read_block,
        )

    def _read_block(self, block_id: int) -> memoryview:
        return memoryview(self.kv[block_id].reshape(-1).view(torch.uint8).cpu().numpy())  # type: ignore[arg-type]

    def execute(self, plan: StepPlan) -> StepResult:
        """Computes the plan's tokens, writes their KV, samples where asked. Returns when the device is done."""
        return self.launch(plan).wait()

    def improve(self) -> bool:
        """For when there is nothing to do: makes later steps quicker, a moment's work. False: nothing is left."""
        improve = getattr(self.forward, "improve", None)
        if improve is None:
            return False
        with torch.inference_mode():
            return improve(self.kv)

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
        order = sorted(range(len(plan.items)), key=lambda i: not _is_decode(plan.items[i]))
        items = [plan.items[i] for i in order]
        token_ids, positions, chunks, last_rows = _pack(items)
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
        keep = [last_rows[i] for i in sampled] or [len(token_ids) - 1]
        with torch.inference_mode():
            logits = self.forward.forward(self.kv, token_ids, positions, chunks, keep, arriving)
        step = LaunchedStep(self._sampler, logits, [items[i] for i in sampled], [order[i] for i in sampled], len(items))
        self._newest = step
        return step


class LaunchedStep:
    """`places` of `items` in the plan; `logits` has a row for each, or one that is there to wait for."""

    def __init__(
        self, sampler: Sampler, logits: torch.Tensor, items: list[PlanItem], places: list[int], count: int
    ) -> None:
        self._sampler = sampler
        self._logits: torch.Tensor | None = logits
        self._items = items
        self._places = places
        self._count = count
        self._drawn: Drawn | None = None

    def draw(self) -> Drawn:
        """Launches the sampling, once. A step that samples nothing has its only row drawn from, to wait for."""
        if self._drawn is None:
            assert self._logits is not None
            with torch.inference_mode():
                if self._items:
                    self._drawn = self._sampler.draw(self._logits, self._items)
                else:
                    self._drawn = Drawn(1, self._logits[:, 0].long(), None)
            self._logits = None
        return self._drawn

    def arriving(self, following: Sequence[tuple[int, int]]) -> Arriving:
        """(row, item of this step's plan): the item's token goes to that row of the next step."""
        row_of = {place: row for row, place in enumerate(self._places)}
        return Arriving([row for row, _ in following], [row_of[place] for _, place in following], self.draw().tokens)

    def wait(self) -> StepResult:
        """When the device has written the KV and sampled: announced blocks must be written, not launched."""
        found, logprobs = self.draw().read()
        tokens: list[int | None] = [None] * self._count
        result_logprobs: list[TokenLogprobs | None] = [None] * self._count
        failures: dict[int, str] = {}
        if self._items:
            for item, place, token, logprob in zip(self._items, self._places, found, logprobs, strict=True):
                if token < 0:
                    failures[place] = CAUSES[token].format(item.position)
                    continue
                tokens[place] = token
                result_logprobs[place] = logprob
        return StepResult(tuple(tokens), tuple(result_logprobs), failures)


def zeroed_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros: padding may read blocks that nobody wrote, and a NaN there would survive a mask.

    In main memory the operating system gives each page when it is first written, so a pool takes only what was used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pool = torch.frombuffer(pages, dtype=dtype).view(shape)  # keeps `pages` alive
    ask_for_large_pages(pool)
    return pool


def _is_decode(item: PlanItem) -> bool:
    return len(item.token_ids) == 1 and item.start > 0


def _pack(items: Sequence[PlanItem]) -> tuple[list[int], list[int], list[Chunk], list[int]]:
    """Token ids and positions of the packed row; the chunks in it; each item's last row."""
    token_ids: list[int] = []
    positions: list[int] = []
    chunks: list[Chunk] = []
    last_rows: list[int] = []
    for item in items:
        count = len(item.token_ids)
        chunks.append(Chunk(len(token_ids), count, item.start, list(item.block_ids)))
        token_ids += item.token_ids
        positions += range(item.start, item.start + count)
        last_rows.append(len(token_ids) - 1)
    return token_ids, positions, chunks, last_rows


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
    config: EngineConfig, model: Any, facts: ModelFacts, device: torch.device, building: Building | None, trial: Trial
) -> Forward:
    heads = getattr(model.config.get_text_config(), "num_attention_heads", facts.num_kv_heads)
    shape = AttentionShape(heads, facts.num_kv_heads, facts.head_dim, config.block_tokens, getattr(torch, facts.dtype))
    native = None if building is None else _native(config, model, facts, shape, building, trial.reference)
    if isinstance(native, NativeStack):
        return native
    if config.batch_invariant:
        return _tried(_invariant(model, facts, shape), facts, shape, device, trial)
    if native is not None and config.attention in ("auto", "native"):
        return _tried(TorchForward(model, native), facts, shape, device, trial)
    phase("trying attention kernels")
    try:
        eager = TorchForward(model, pick_backend(config.attention, device, shape))
    except AttentionChoiceError as error:
        raise ModelLoadError(str(error)) from error
    eager = _tried(eager, facts, shape, device, trial)
    if device.type == "cuda" and config.kernels != "torch":
        eager = _fused(eager, model, facts, shape, trial.reference)
    if device.type != "cuda" or not config.cuda_graphs or not hasattr(eager.backend, "static"):
        return eager
    context_blocks = -(-facts.context_limit_tokens // config.block_tokens)
    return GraphForward(eager, CudaRecorder(device), context_blocks, config.max_running_sequences)


def _tried(
    forward: TorchForward, facts: ModelFacts, shape: AttentionShape, device: torch.device, trial: Trial
) -> TorchForward:
    """The slowest path: what fails here is not served."""
    kv_shape = (facts.num_layers, 2, shape.kv_heads, shape.block_tokens, shape.head_dim)
    off = disagreement(forward, trial.reference, kv_shape, shape.dtype, device)
    if not off:
        return forward
    limit = servable_limit(
        forward, trial.reference, kv_shape, shape.dtype, device, trial.described, facts.context_limit_tokens
    )
    fix = "choose another model" if limit is None else f"set engine.context_limit_tokens to at most {limit}"
    raise ModelLoadError(f"{facts.name} would be computed wrongly: {off}; {fix}")


def _fused(
    eager: TorchForward, model: Any, facts: ModelFacts, shape: AttentionShape, reference: Reference
) -> TorchForward:
    kv_shape = (facts.num_layers, 2, shape.kv_heads, shape.block_tokens, shape.head_dim)
    made = fused_model(model, eager.backend, shape.heads, kv_shape, shape.dtype)
    if isinstance(made, str):
        log.info("%s runs on transformers' own layers, not on fused kernels, because %s", facts.name, made)
        return eager
    fused = TorchForward(made, eager.backend, layers="fused layers")
    off = disagreement(fused, reference, kv_shape, shape.dtype, next(model.parameters()).device)
    if off:
        log.warning("%s runs on transformers' own layers, not on fused kernels: %s", facts.name, off)
    return eager if off else fused


def _native(
    config: EngineConfig,
    model: Any,
    facts: ModelFacts,
    shape: AttentionShape,
    building: Building,
    reference: Reference,
) -> NativeStack | NativeBackend | None:
    """What of our own kernels serves this model; raises ModelLoadError where they are demanded and cannot."""
    try:
        threads = torch.get_num_threads()
        phase("compiling the kernels")
        library = building.library(threads, chosen(config.pin_threads, threads))
    except ProcessorsError as error:
        raise ModelLoadError(str(error)) from None
    except NativeBuildError as error:
        if config.kernels == "native":
            raise ModelLoadError(f"engine.kernels is native, and {error}; or set it to auto or torch") from None
        log.warning("the model runs on torch's own operators, which is slower: %s", error)
        return None
    phase("trying the kernels")
    stack: NativeStack | str = "engine.attention names another"
    if config.attention in ("auto", "native"):
        limit = facts.context_limit_tokens
        stack = native_stack(library, model, shape, facts.num_layers, limit, reference)
        if isinstance(stack, NativeStack):
            return stack
        log.info("%s runs in torch with native attention: not as a whole, because %s", facts.name, stack)
    attention = native_attention(library, shape)
    if isinstance(attention, NativeBackend):
        return attention
    if config.kernels == "native" or config.attention == "native":
        raise ModelLoadError(f"{facts.name} cannot run on native kernels: {attention}; set engine.kernels to auto")
    log.warning("attention runs on torch's own operators, which is slower: %s", attention)
    return None


def _invariant(model: Any, facts: ModelFacts, shape: AttentionShape) -> TorchForward:
    """Fixed shapes for every product: what EngineConfig.batch_invariant promises rests on this."""
    try:
        make_linears_invariant(model)
    except NotInvariantError as error:
        raise ModelLoadError(
            f"{facts.name} cannot be served batch-invariantly: {error}; set engine.batch_invariant to false"
        ) from None
    obstacle = trial_of_invariance(model, shape)
    if obstacle is not None:
        raise ModelLoadError(
            f"torch is not batch-invariant on this machine with {facts.name}: {obstacle}; "
            "set engine.batch_invariant to false"
        )
    return TorchForward(model, InvariantBackend(), TILE_ROWS)


def _num_blocks(config: EngineConfig, facts: ModelFacts, device: torch.device) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    element = torch.empty((), dtype=getattr(torch, facts.dtype)).element_size()
    block_bytes = facts.num_layers * 2 * facts.num_kv_heads * config.block_tokens * facts.head_dim * element
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
    else:
        free_bytes = _CPU_POOL_BYTES
    blocks = int(free_bytes * config.kv_memory_fraction) // block_bytes
    if blocks < 1:
        raise ModelLoadError(
            f"{free_bytes} free bytes hold no KV block of {block_bytes} bytes; free memory, or set engine.num_blocks"
        )
    return blocks
