"""What a prompt's KV takes, and what of it is handed over: with windows and without, as a latent, as a state.

    python -m benchmarks.handover

Small models of random weights. A prefill and a decode worker's cores in one thread, with real runners and a transport
that copies between their pools: bytes are those that the transport moved, and those of the blocks that pools hold.
Prompts are of 2 and of 8 windows.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu_check.families import FAMILIES, WINDOW, Family
from benchmarks.gpu_check.models import make_core, make_runner, prompt_of
from benchmarks.report import parse, save, table
from decode_worker.core import DecodeCore
from engine.block_pool import BlockPool
from engine.types import SamplingParams
from kv_transfer.handoff import PeerId
from kv_transfer.reader import HandoffReader
from kv_transfer.source import HandoffSource
from kv_transfer.transport_inprocess import InProcessNetwork, InProcessTransport, block_digest
from prefill_worker.core import PrefillCore
from worker.messages import (
    HandoffRef,
    ReaderMessages,
    RouterCommands,
    RouterConnected,
    SourceMessages,
    StartSequence,
    Transported,
)

BLOCK = 16
_LINK = 1
_CHUNK = 64
_STEP_S = 0.01
_LONGEST_S = 60.0  # of virtual time

_BY_CLASS = {family.made_of: family for family in FAMILIES}
_WINDOWS, _LATENT = _BY_CLASS["GptOssConfig"], _BY_CLASS["DeepseekV3Config"]
MODELS = {
    "windows in every second layer": _WINDOWS,
    "the same without windows": replace(
        _WINDOWS, changes=_WINDOWS.changes | {"layer_types": ["full_attention"] * 4}, rules=("full",)
    ),
    "windows in all layers": replace(
        _WINDOWS,
        changes=_WINDOWS.changes | {"layer_types": ["sliding_attention"] * 4},
        rules=(f"window({WINDOW})",),
    ),
    # Without experts: in bfloat16 rounding sends rows of so small a model to others, and the trial at start refuses it.
    "latent": replace(_LATENT, changes=_LATENT.changes | {"first_k_dense_replace": 4}, experts=False),
    "states beside attention": _BY_CLASS["FalconH1Config"],
}


class Side:
    """One worker: runner, pool, transport, core, and what its router heard."""

    def __init__(self, name: str, runner: Any, network: InProcessNetwork) -> None:
        self.peer = PeerId(name, 1)
        self.runner = runner
        self.memory = runner.memory()
        self.pool = BlockPool(runner.num_blocks, runner.generations)
        self.events: list[Any] = []
        self.transport = InProcessTransport(self.peer, network, self.events.append)
        self.transport.register(self.memory)
        self.core: Any = None
        self.most_held = self.held()

    def held(self) -> list[int]:
        """Bytes of blocks that somebody holds, by group."""
        groups = self.runner.facts.groups
        free = [self.pool.free_in(n) for n in range(len(groups))]
        has = zip(groups, self.pool.blocks_by_group, free, strict=True)
        return [g.block_bytes(BLOCK) * (count - left) for g, count, left in has]

    def step(self, now: float) -> Any:
        """The core's next words, after a step if there is one."""
        self.core.tick(now)
        plan = self.core.schedule(now)
        self.most_held = [max(pair) for pair in zip(self.most_held, self.held(), strict=True)]
        if plan is not None:
            self.core.commit(plan, self.runner.execute(plan), now, now)
        return self.core.take_outbox()


@dataclass(slots=True)
class HandedOver:
    """Bytes. `prefill` and `decode`: the most that was held there while a step was computed, by group."""

    tokens: int
    prefill: list[int]
    decode: list[int]
    moved: int


def hand_over(runners: tuple[Any, Any], tokens: int, vocab: int) -> HandedOver:
    """One prompt, until the decode side has two tokens after it."""
    network = InProcessNetwork()
    p, d = Side("prefill", runners[0], network), Side("decode", runners[1], network)
    p.transport.connect(d.peer, d.transport.endpoint())
    d.transport.connect(p.peer, p.transport.endpoint())
    source = HandoffSource(
        p.pool,
        lease_s=_LONGEST_S,
        max_leases=4,
        max_leased_blocks=p.memory.num_blocks,
        follow_wait_s=_LONGEST_S,
        digest=lambda block: block_digest(p.memory, block),
    )
    reader = HandoffReader(
        d.pool,
        d.transport.submit,
        d.transport.abandon,
        block_bytes=d.runner.block_bytes_by_group,
        pull_timeout_s=_LONGEST_S,
        announce_timeout_s=_LONGEST_S,
        renew_every_s=1.0,
        max_blocks_per_pull=[8] * len(d.memory.areas),
        max_quarantined_blocks=d.memory.num_blocks,
        numbers=itertools.count(1),
    )
    p.core = PrefillCore(make_core(p.runner, _CHUNK, p.pool), source, report_every_s=1.0)
    d.core = DecodeCore(make_core(d.runner, _CHUNK, d.pool), reader, report_every_s=1.0, room_wait_s=_LONGEST_S)
    start = StartSequence(0, "r0", prompt_of(tokens, vocab, seed=tokens), [], SamplingParams(max_tokens=3))
    for side, leg in (
        (d, replace(start, pull=HandoffRef("h0", p.peer, ""))),
        (p, replace(start, serve_handoff_id="h0")),
    ):
        side.core.handle(RouterConnected(_LINK), 0.0)
        side.core.handle(RouterCommands(_LINK, (leg,)), 0.0)
    now = 0.0
    adopted: Any = None
    ended = False
    while not ended:
        now += _STEP_S
        assert now < _LONGEST_S, "the handoff did not end"
        for side, other in ((p, d), (d, p)):
            outbox = side.step(now)
            if outbox is None:
                continue
            for _, message in outbox.to_readers:
                other.core.handle(SourceMessages(side.peer, (message,)), now)
            for _, message in outbox.to_sources:
                other.core.handle(ReaderMessages(side.peer, (message,)), now)
            heard = outbox.links.get(_LINK)
            if heard is None:
                continue
            assert not heard.handoff_failures, heard.handoff_failures
            if side is d:
                adopted = next(iter(heard.adoptions), adopted)
                ended = bool(heard.ends)
                assert all(not end.error for end in heard.ends), heard.ends
        network.step(now)
        while d.events:
            d.core.handle(Transported(d.events.pop(0)), now)
    assert adopted is not None, "decode computed the prompt itself"
    return HandedOver(tokens, p.most_held, d.most_held, adopted.pulled_bytes)


def measure(family: Family, dtype: str) -> dict[str, Any]:
    options = {"kernels": "torch", "block_tokens": BLOCK, "max_running_sequences": 4, "max_batch_tokens": _CHUNK}
    device = torch.device("cpu")
    runners = tuple(make_runner(device, family, dtype, 64, **options)[0] for _ in range(2))
    groups = runners[0].facts.groups
    assert [str(g.rule) for g in groups] == list(family.rules)
    found: dict[str, Any] = {
        "groups": {str(g.rule): len(g.layers) for g in groups},
        "bytes_a_token": sum(g.token_bytes for g in groups),
        "prompts": {},
    }
    for windows in (2, 8):
        one = hand_over((runners[0], runners[1]), windows * WINDOW, family.vocab)
        found["prompts"][str(one.tokens)] = {"prefill": one.prefill, "decode": one.decode, "moved": one.moved}
    short, long = (found["prompts"][str(n * WINDOW)]["moved"] for n in (2, 8))
    found["moved_a_further_token"] = (long - short) / (6 * WINDOW)
    found["moved_besides"] = short - 2 * WINDOW * found["moved_a_further_token"]
    if groups[0].rule.values:
        config = family.config()
        width = config.kv_lora_rank + config.qk_rope_head_dim
        found["compressed_bytes_a_token"] = width * config.num_hidden_layers * getattr(torch, dtype).itemsize
    return found


def report(found: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, f in found.items():
        for tokens, of in f["prompts"].items():
            kib = [f"{n / 1024:.1f}" for n in (sum(of["prefill"]), sum(of["decode"]), of["moved"])]
            rows.append((name, tokens, *kib))
    table(("KiB", "prompt", "most held, prefill", "most held, decode", "handed over"), rows)
    rows = [
        (
            name,
            ", ".join(f"{rule} x{layers}" for rule, layers in f["groups"].items()),
            f["bytes_a_token"],
            f"{f['moved_a_further_token']:g}",
            f"{f['moved_besides']:g}",
            f.get("compressed_bytes_a_token", ""),
        )
        for name, f in found.items()
    ]
    table(
        ("bytes", "groups x layers", "a token, pool", "a further token, wire", "besides, wire", "compressed size"), rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--only", default="", help="names of models, joined by commas; empty = all")
    arguments = parse(parser, only="windows in every second layer,states beside attention")
    wanted = arguments.only.split(",") if arguments.only else list(MODELS)
    if unknown := sorted(set(wanted) - set(MODELS)):
        parser.error(f"there is no model {unknown[0]}; there are {', '.join(MODELS)}")
    found = {name: measure(MODELS[name], arguments.dtype) for name in wanted}
    report(found)
    save("handover", {"dtype": arguments.dtype, "window": WINDOW, "block_tokens": BLOCK, "models": found})


if __name__ == "__main__":
    main()
