"""Decode steps through graphs of fixed shape, on a machine without CUDA: everything but the recording itself.

Triton's kernels run in its interpreter; a "graph" here is run again on the same buffers, which is what a replay is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import graphs
from engine.attention.gather import GatherBackend
from engine.attention.interface import Chunk, register
from engine.forward import TorchForward
from engine.graphs import CudaRecorder, GraphForward
from engine.model_loader import load_model
from tests.support.triton_interpreter import ON_GPU

from engine.attention.triton_paged import Sizes, TritonBackend  # isort: skip  (after the interpreter)

SMALL = Sizes(rows=16, few_rows=16, keys=16, split_tokens=32)
BLOCK, BLOCKS = 8, 64
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


class Again:
    """Replays by running again; counts both."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        work()

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    path: Path = tmp_path_factory.mktemp("model")
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    register()
    return load_model(str(path), "float32", DEVICE, None)[0]


def pool() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((BLOCKS, 1, 2, 2, BLOCK, 16), generator=generator).to(DEVICE)


def step(lengths: list[int], seed: int = 0) -> tuple[list[int], list[int], list[Chunk]]:
    """Decodes after `lengths` tokens, in scattered blocks."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(BLOCKS, generator=generator).tolist()
    chunks = [Chunk(i, 1, n, [free.pop() for _ in range(n // BLOCK + 1)]) for i, n in enumerate(lengths)]
    tokens = torch.randint(97, (len(lengths),), generator=generator).tolist()
    return tokens, lengths, chunks


def graphs_of(model: Any, recorder: Any, max_batch: int = 6) -> GraphForward:
    return GraphForward(TorchForward(model, TritonBackend(SMALL)), recorder, 32, max_batch, expect=False)


@torch.inference_mode()
def check(model: Any, forward: GraphForward, lengths: list[int], seed: int = 0) -> None:
    """The step eagerly, as its shape's trial, and as a replay: it writes the same each time."""
    tokens, positions, chunks = step(lengths, seed)
    pools = [pool(), pool()]
    keep = list(range(len(lengths)))
    forward.forward(pools[0], tokens, positions, chunks, keep)
    while forward.improve(pools[0]):
        pass
    for _ in range(2):
        found = forward.forward(pools[0], tokens, positions, chunks, keep)
    expected = TorchForward(model, GatherBackend()).forward(pools[1], tokens, positions, chunks, keep)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=2e-5), (found - expected).abs().max()
    assert torch.allclose(pools[0], pools[1], atol=1e-5), "something else than the new keys and values was written"


@pytest.mark.skipif(ON_GPU, reason="a graph there is recorded for one pool; see the test below")
def test_replays_equal_eager_steps(model: Any) -> None:
    """Each step has another pool here, so graphs are made anew: one pool a graph is what the engine does."""
    for seed, lengths in enumerate(([20], [1, 31, 32, 63, 90], [5, 9, 100, 3])):
        check(model, graphs_of(model, Again()), lengths, seed)


@torch.inference_mode()
def test_one_graph_serves_many_steps(model: Any) -> None:
    recorder = CudaRecorder(DEVICE) if ON_GPU else Again()
    forward = graphs_of(model, recorder)
    ours, theirs = pool(), pool()
    for seed in range(6):
        lengths = [(7 + 13 * seed + 31 * i) % 120 + 1 for i in range(3 + seed % 2)]
        tokens, positions, chunks = step(lengths, seed)
        keep = list(range(len(lengths)))
        found = forward.forward(ours, tokens, positions, chunks, keep)
        expected = TorchForward(model, GatherBackend()).forward(theirs, tokens, positions, chunks, keep)
        assert torch.allclose(found, expected, atol=2e-5), seed
        assert torch.allclose(ours, theirs, atol=1e-5), seed
        while forward.improve(ours):  # as between requests
            pass
    if isinstance(recorder, Again):
        assert recorder.recorded == 1  # three and four sequences share a bucket
        assert recorder.replayed == 5, "all but the first"
    assert "given up" not in forward.name


@torch.inference_mode()
def test_other_steps_run_eagerly(model: Any) -> None:
    recorder = Again()
    forward = graphs_of(model, recorder)
    kv = pool()
    prompt = Chunk(0, 5, 0, [3])
    assert forward.forward(kv, [1] * 5, list(range(5)), [prompt], [4]).shape == (1, 97)
    tokens, positions, chunks = step([9] * 7)  # above the largest batch
    assert forward.forward(kv, tokens, positions, chunks, list(range(7))).shape == (7, 97)
    tokens, positions, chunks = step([200, 1, 1, 1])  # mostly idle programs
    assert forward.forward(kv, tokens, positions, chunks, list(range(4))).shape == (4, 97)
    tokens, positions, chunks = step([9, 20])  # logits asked for in another order than the sequences'
    turned = forward.forward(kv, tokens, positions, chunks, [1, 0])
    assert torch.equal(turned, forward.forward(kv, tokens, positions, chunks, [1, 0]))
    assert recorder.recorded == 0
    assert not forward.improve(kv), "nothing of that would be a graph"


@pytest.mark.skipif(ON_GPU, reason="counts the recordings of a stand-in")
@torch.inference_mode()
def test_shapes_are_recorded_between_requests_or_when_there_is_no_between(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, kv = Again(), pool()
    forward = GraphForward(TorchForward(model, TritonBackend(SMALL)), recorder, 32, 2)
    before = kv.clone()
    while forward.improve(kv):
        pass
    assert recorder.recorded == 2, "batches of one and two, before they are met"
    assert torch.equal(kv, before), "on padding: nothing is written"
    monkeypatch.setattr(graphs, "_IMPATIENT", 2)
    busy = graphs_of(model, recorder)
    tokens, positions, chunks = step([3])
    for met in range(4):
        busy.forward(kv, tokens, positions, chunks, [0])
        assert recorder.recorded == 2 + (met > 0)
    assert recorder.replayed == 3


class _Fails:
    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")


class _Garbles:
    def __init__(self, forward: list[GraphForward]) -> None:
        self._forward = forward

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        logits: torch.Tensor = work.__self__.logits  # type: ignore[attr-defined]
        return lambda: logits.mul_(-1) is None


@pytest.mark.parametrize(("recorder", "words"), [(_Fails(), "not permitted"), (_Garbles([]), "differ from the eager")])
@torch.inference_mode()
def test_a_recording_that_does_not_work_is_given_up(
    model: Any, recorder: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    forward = graphs_of(model, recorder)
    with caplog.at_level(logging.WARNING):
        check(model, forward, [20, 33])
        check(model, forward, [21, 34])
    assert words in caplog.text
    assert caplog.text.count("without CUDA graphs") == 1
    assert "given up" in forward.name
