"""Prefill and decode of random-weight models, as shares of the measured ceilings; and where a step's time goes.

Steps are the engine's own: scheduled, executed, committed. A decode batch begins as on a decode worker: sequences are
held, get blocks, and adopt a context whose KV nobody computed (zeros: the work is the same).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_check.backends import serving_groups
from benchmarks.gpu_check.context import Absent, Check, CheckFailed, significant
from benchmarks.gpu_check.models import (
    SHAPES,
    TINY_SHAPES,
    Shape,
    Weights,
    make_core,
    make_runner,
    prompt_of,
)
from benchmarks.gpu_check.variants import record_graphs, took_effect, variants
from benchmarks.report import median

PREFILLS, TINY_PREFILLS = (512, 1024, 2048, 4096, 8192), (32, 64)
BATCHES, TINY_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 4)
CONTEXT, TINY_CONTEXT = 1024, 40
REPEATS, TINY_REPEATS = 10, 3
_BLOCK_TOKENS = 32
_WARM_UP = 2
_HEADROOM_BYTES = 6 << 30  # logits, activations, what a backend gathers


def kv_token_bytes(shape: Shape, element_bytes: int) -> int:
    return shape.layers * 2 * shape.kv_heads * shape.head_dim * element_bytes


def prefill_flops(shape: Shape, weights: Weights, tokens: int) -> float:
    """Products with weights that a token passes, logits of the last token, and the causal half of attention."""
    share = shape.experts_per_token / shape.experts if shape.experts else 0.0
    products = 2 * tokens * (weights.dense + weights.expert * share) + 2 * weights.head
    return products + 2 * 2 * shape.layers * shape.heads * shape.head_dim * tokens * (tokens + 1) / 2


def decode_bytes(shape: Shape, weights: Weights, batch: int, context: int) -> float:
    """Weights once, of the experts those that a batch is expected to touch, and the KV of every context."""
    touched = 1 - (1 - shape.experts_per_token / shape.experts) ** batch if shape.experts else 0.0
    read = (weights.dense + weights.head + weights.expert * touched) * weights.element_bytes
    return read + batch * context * kv_token_bytes(shape, weights.element_bytes)


class Prefill:
    """One prompt in one step."""

    def __init__(self, runner: Any, tokens: int) -> None:
        self._runner, self._tokens, self._number = runner, tokens, 0

    def step(self) -> float:
        from engine.types import SamplingParams, SequenceSpec

        self._number += 1
        core = make_core(self._runner, self._tokens)
        prompt = prompt_of(self._tokens, self._runner.facts.vocab_size, self._number)
        refusal = core.add(SequenceSpec(1, prompt, SamplingParams(max_tokens=1)), 0.0)
        assert refusal is None, refusal
        begun = time.perf_counter()
        plan = core.schedule(0.0)
        assert plan is not None
        assert plan.num_tokens == self._tokens
        core.commit(plan, self._runner.execute(plan), 0.0)
        return time.perf_counter() - begun


class Decode:
    """A batch of sequences that go on and on."""

    def __init__(self, runner: Any, batch: int, context: int, steps: int) -> None:
        from engine.types import SamplingParams, SequenceSpec

        self._runner, self._batch = runner, batch
        self.core = make_core(runner, max(batch, 16))
        for i in range(batch):
            prompt = prompt_of(context, runner.facts.vocab_size, i)
            sampling = SamplingParams(max_tokens=steps + 4)
            refusal = self.core.add(SequenceSpec(i, prompt, sampling, hold=True), 0.0)
            assert refusal is None, refusal
            assert self.core.reserve(i, context, 0.0) is not None
            self.core.adopt(i, context, [1], 0.0)

    def step(self) -> float:
        begun = time.perf_counter()
        plan = self.core.schedule(0.0)
        assert plan is not None
        assert plan.num_tokens == self._batch, "every sequence decodes one token"
        self.core.commit(plan, self._runner.execute(plan), 0.0)
        return time.perf_counter() - begun


class Overlapping(Decode):
    """The same, each step launched before the one before it is waited for."""

    _flying: tuple[Any, Any] | None = None

    def step(self) -> float:
        begun = time.perf_counter()
        plan = self.core.schedule(0.0)
        assert plan is not None
        before, self._flying = self._flying, (plan, self._runner.launch(plan))
        self._land(before)
        return time.perf_counter() - begun

    def finish(self) -> None:
        self._land(self._flying)

    def _land(self, flying: tuple[Any, Any] | None) -> None:
        if flying is not None:
            self.core.commit(flying[0], flying[1].wait(), 0.0)


def step_seconds(check: Check, step: Callable[[], float], repeats: int) -> float:
    """`execute` returns when the device is done, so a wall clock tells what a step takes."""
    for _ in range(_WARM_UP):
        step()
    times: list[float] = []
    while len(times) < repeats and (len(times) < 3 or check.left_s() > 0):
        times.append(step())
    return median(times)


def blocks_needed(batch: int, context: int, steps: int) -> int:
    return batch * -(-(context + steps + 4) // _BLOCK_TOKENS) + 1


@dataclass(slots=True)
class Bench:
    """One model made, and what its figures are compared with and written to."""

    shape: Shape
    weights: Weights
    runner: Any
    largest_batch: int  # whose KV fits
    ceilings: dict[str, Any]
    left_out: list[str]
    label: str = ""  # the backend, and how graphs are set
    rows: list[tuple[object, ...]] = field(default_factory=list)

    def note(self, what: str, took: float, tokens: int, rate: float, unit: str, ceiling: str) -> dict[str, Any]:
        share = significant(rate / self.ceilings[ceiling], 3) if ceiling in self.ceilings else None
        shown = "?" if share is None else f"{share:.1%}"
        self.rows.append((self.label, what, f"{took * 1e3:.2f}", f"{tokens / took:.0f}", f"{rate:.4g} {unit}", shown))
        return {
            "ms": significant(took * 1e3),
            "tokens_per_s": significant(tokens / took),
            ceiling: significant(rate),
            "share_of_ceiling": share,
        }


def blocks_that_fit(check: Check, shape: Shape) -> int:
    """Beside the weights, which are not made yet."""
    free = check.free_bytes() - 2 * shape.parameters() - _HEADROOM_BYTES * check.on_gpu
    return max(0, free // (_BLOCK_TOKENS * kv_token_bytes(shape, 2)))


def throughput(check: Check, found: dict[str, Any]) -> None:
    measured = check.sections.get("ceilings", {})
    found["ceilings"] = {k: measured[k] for k in ("matmul_tflops", "copy_gb_per_s") if k in measured}
    found["variants"] = [variant.label or "plain" for variant in variants(check)]
    failures: list[str] = []
    found["left_out"] = left_out = []
    shapes = TINY_SHAPES if check.tiny else SHAPES
    for i, shape in enumerate(shapes):
        needed, free = 2 * shape.parameters() + _HEADROOM_BYTES * check.on_gpu, check.free_bytes()
        if needed > free:
            left_out.append(f"{shape.name}: needs {needed / 2**30:.1f} GiB, free are {free / 2**30:.1f}")
            check.say(f"throughput: left out: {left_out[-1]}")
            continue
        if check.left_s() <= 0:
            left_out.append(f"{shape.name}: the time was over")
            check.say(f"throughput: left out: {left_out[-1]}")
            continue
        end, check.deadline = check.deadline, time.monotonic() + check.left_s() / (len(shapes) - i)
        try:
            found[shape.name] = {}
            measure_model(check, shape, found[shape.name], found, failures)
        except Exception as error:  # out of memory in one model is no reason to leave out the next
            if not check.device_works():
                raise
            failures.append(f"{shape.name}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
        finally:
            check.deadline = end
        check.free_memory()
    if failures:
        raise CheckFailed("\n".join(failures))


def measure_model(
    check: Check, shape: Shape, result: dict[str, Any], whole: dict[str, Any], failures: list[str]
) -> None:
    context = TINY_CONTEXT if check.tiny else CONTEXT
    steps = _WARM_UP + (TINY_REPEATS if check.tiny else REPEATS)
    batches = TINY_BATCHES if check.tiny else BATCHES
    prefills = TINY_PREFILLS if check.tiny else PREFILLS
    room = blocks_that_fit(check, shape)
    largest = max([b for b in batches if blocks_needed(b, context, steps) <= room], default=0)
    num_blocks = max(blocks_needed(largest, context, steps), prefills[-1] // _BLOCK_TOKENS + 1)
    for variant in variants(check):
        begun = time.perf_counter()
        options = {"block_tokens": _BLOCK_TOKENS, **variant.options}
        runner, weights = make_runner(check.device, shape, "bfloat16", num_blocks, **options)
        check.say(f"{shape.name}: made in {time.perf_counter() - begun:.0f} s, {num_blocks} blocks {variant.label}")
        result["parameters"] = weights.dense + weights.expert + weights.head
        result["chosen_backend"] = own = runner.forward.backend.name
        bench = Bench(shape, weights, runner, largest, whole["ceilings"], whole["left_out"])
        usable = {own: runner.forward.backend}
        if variant.every_backend:
            usable |= {name: backend for name, backend in serving_groups(check, runner)[0] if name != own}
        for name in sorted(usable, key=lambda n, own=own: n != own):  # the engine's own choice first
            if name != own:
                runner.forward.backend = usable[name]
            bench.label = ", ".join(n for n in (name, variant.label) if n)
            figures = result.setdefault(bench.label, {"prefill": {}, "decode": {}, "decode, overlapping": {}})
            try:
                measure_backend(check, bench, figures, context, steps)
            except Exception as error:
                if not check.device_works():
                    whole["broke_the_device"] = name
                    raise
                failures.append(
                    f"{shape.name}, {bench.label}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
                )
        if missing := took_effect(variant, runner):
            whole["left_out"].append(f"{shape.name}: {missing}")
        check.table((shape.name, f"context {context}", "ms", "tokens/s", "", "share of ceiling"), bench.rows)
        del runner, bench, usable  # before the next one is made
        check.free_memory()


def measure_backend(check: Check, bench: Bench, figures: dict[str, Any], context: int, steps: int) -> None:
    shape, weights, runner = bench.shape, bench.weights, bench.runner
    for tokens in TINY_PREFILLS if check.tiny else PREFILLS:
        if check.left_s() <= 0:
            bench.left_out.append(f"{shape.name}, {bench.label}, prefill {tokens}: the time was over")
            continue
        took = step_seconds(check, Prefill(runner, tokens).step, max(3, (steps - _WARM_UP) // 2))
        rate = prefill_flops(shape, weights, tokens) / took / 1e12
        note = bench.note(f"prefill {tokens}", took, tokens, rate, "TFLOP/s", "matmul_tflops")
        figures["prefill"][str(tokens)] = note
    for batch in TINY_BATCHES if check.tiny else BATCHES:
        if batch > bench.largest_batch or check.left_s() <= 0:
            why = "its KV does not fit" if batch > bench.largest_batch else "the time was over"
            bench.left_out.append(f"{shape.name}, {bench.label}, decode {batch}: {why}")
            continue
        decode = Decode(runner, batch, context, steps)
        decode.step()  # its shape is met
        record_graphs(runner)
        took = step_seconds(check, decode.step, steps - _WARM_UP)
        rate = decode_bytes(shape, weights, batch, context) / took / 1e9
        figures["decode"][str(batch)] = bench.note(f"decode {batch}", took, batch, rate, "GB/s", "copy_gb_per_s")
        overlapping = Overlapping(runner, batch, context, steps)
        took = step_seconds(check, overlapping.step, steps - _WARM_UP)
        overlapping.finish()
        rate, what = decode_bytes(shape, weights, batch, context) / took / 1e9, f"decode {batch}, overlapping"
        figures["decode, overlapping"][str(batch)] = bench.note(what, took, batch, rate, "GB/s", "copy_gb_per_s")


class _TimedModel:
    """Stands for the runner's model and notes when it began and ended, with the device idle at both."""

    def __init__(self, check: Check, model: Any) -> None:
        self._check, self._model = check, model
        self.spans: list[tuple[float, float]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check.synchronize()
        begun = time.perf_counter()
        out = self._model(*args, **kwargs)
        self._check.synchronize()
        self.spans.append((begun, time.perf_counter()))
        return out


def phases(check: Check, found: dict[str, Any]) -> None:
    """Medians per phase. `inputs` is all before the model's call, `sample` all after it; the two more stops for the
    device that this takes are in `sum` and not in `undisturbed`.
    """
    shape = (TINY_SHAPES if check.tiny else SHAPES)[0]
    context = TINY_CONTEXT if check.tiny else CONTEXT
    repeats = 3 if check.tiny else 20
    steps = 2 * (_WARM_UP + repeats)
    batches = (1, 4) if check.tiny else (1, 32, 256)
    room = blocks_that_fit(check, shape)
    batches = [b for b in batches if blocks_needed(b, context, steps) <= room]
    if not batches:
        raise Absent(f"the memory does not hold a model of the {shape.name} shape")
    num_blocks = blocks_needed(max(batches), context, steps)
    for variant in variants(check):
        if variant.options["cuda_graphs"]:
            continue  # a replay has no phases
        options = {"block_tokens": _BLOCK_TOKENS, **variant.options}
        runner, _ = make_runner(check.device, shape, "bfloat16", num_blocks, **options)
        measure_phases(
            check, runner, variant.label, batches, found.setdefault(variant.label, {}) if variant.label else found
        )
        del runner
        check.free_memory()


def measure_phases(check: Check, runner: Any, label: str, batches: list[int], found: dict[str, Any]) -> None:
    shape = (TINY_SHAPES if check.tiny else SHAPES)[0]
    context = TINY_CONTEXT if check.tiny else CONTEXT
    repeats = 3 if check.tiny else 20
    steps = 2 * (_WARM_UP + repeats)
    model: Any = runner.forward.model
    names = ("schedule", "inputs", "model", "sample", "commit")
    rows = []
    for batch in batches:
        decode = Decode(runner, batch, context, steps)
        undisturbed = step_seconds(check, decode.step, repeats)
        timed = runner.forward.model = _TimedModel(check, model)
        spans: dict[str, list[float]] = {n: [] for n in names}
        for i in range(_WARM_UP + repeats):
            t0 = time.perf_counter()
            plan = decode.core.schedule(0.0)
            assert plan is not None
            t1 = time.perf_counter()
            result = runner.execute(plan)
            t4 = time.perf_counter()
            decode.core.commit(plan, result, 0.0)
            t5 = time.perf_counter()
            assert timed.spans, "the runner did not call its model: its steps are of another make, adapt this section"
            t2, t3 = timed.spans[-1]
            if i >= _WARM_UP:
                for name, begun, ended in zip(names, (t0, t1, t2, t3, t4), (t1, t2, t3, t4, t5), strict=True):
                    spans[name].append((ended - begun) * 1e3)
        runner.forward.model = model
        medians = {n: significant(median(v), 3) for n, v in spans.items()}
        total = significant(sum(medians.values()), 3)
        found[f"decode {batch}"] = {**medians, "sum": total, "undisturbed": significant(undisturbed * 1e3, 3)}
        rows.append((f"decode {batch}", *found[f"decode {batch}"].values()))
    found["model"], found["context"], found["backend"] = shape.name, context, runner.forward.backend.name
    check.table((f"{shape.name}{', ' if label else ''}{label}, ms a step", *names, "sum", "undisturbed"), rows)
