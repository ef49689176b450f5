"""Which workers belong together, while a cluster is upgraded: old and new ones serve side by side.

    layout     what KV looks like (its fingerprint): a prompt is handed over, an answer moves, between equal ones only
    revision   what an answer is computed from: the weights, and the type in which they are computed

A worker of another layout and the same revision may go on with any request: it computes the prompt and what was emitted
anew, and the answer is the same. One of another revision must not: it would answer differently. So a request stays
within the revision that it began on, in every recovery and on every router, or ends with an error.

New requests go to every revision that can answer, by the number of its decode workers: the new one has its share from
its first complete set on, and the load moves as the workers do.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kv_transfer.prefix_hint import hint_root, prefix_hints
from router.errors import Code, Failure, RequestRefused, refuse
from router.placement.adapters import Adapters
from router.placement.cluster import Cluster, WorkerInfo
from router.placement.view import WorkerKey

log = logging.getLogger(__name__)

NO_CLAIM = (
    "workers of one checkpoint serve together although their weights are quantized otherwise; an answer that several "
    "schemes computed is not token-identical to that of any one engine, and its route names them (mixed_weights)"
)
NOBODY: frozenset[WorkerKey] = frozenset()
_FEW = 4
_COME_AGAIN_MS = 500  # a router that has just started may not know them yet


def revision_of(info: WorkerInfo) -> str:
    """Empty: it does not say, and belongs to all."""
    return f"{info.model_identity}/{info.dtype}" if info.model_identity and info.dtype else ""


def mixed_revision_of(info: WorkerInfo) -> str:
    """Of all that it mixes with (router.mixed_quantization). A router without that setting does not know it, and so
    never goes on with an answer whose beginning another scheme may have computed.
    """
    if not info.unquantized_identity or not info.dtype:
        return revision_of(info)
    dtype = " ".join(info.dtype.replace(info.weights, "", 1).split())
    return f"mixed/{info.unquantized_identity}/{dtype}"


def _short(info: WorkerInfo) -> str:
    return " ".join(filter(None, (info.model_identity[:8], info.dtype)))


@dataclass(slots=True)
class _Ready:
    """Of the ready workers, worked out anew when these are others."""

    at: tuple[int, ...] = ()
    layouts: tuple[tuple[str, int, int], ...] = ()  # fingerprint, tokens of a block, original context
    by_revision: dict[str, frozenset[WorkerKey]] = field(default_factory=dict)
    able: dict[str, int] = field(default_factory=dict)  # revisions that new requests go to, with their decode workers
    maskless: frozenset[WorkerKey] = NOBODY
    scoreless: frozenset[WorkerKey] = NOBODY
    beamless: frozenset[WorkerKey] = NOBODY
    others: dict[str, frozenset[WorkerKey]] = field(default_factory=dict)  # as `Revisions.others` was asked


class Revisions:
    def __init__(
        self,
        cluster: Cluster,
        model_name: str,
        rng: random.Random,
        other_weights: Literal["refuse", "beside"],
        adapters: Adapters | None = None,
    ) -> None:
        self._cluster = cluster
        self._model_name = model_name
        self._rng = rng
        self._adapters = adapters or Adapters(cluster, ())
        self._beside = other_weights == "beside"
        self._revision_of = mixed_revision_of if cluster.mixed else revision_of
        if cluster.mixed:
            log.warning("router.mixed_quantization is on: %s", NO_CLAIM)
        self._weights = ""  # that answers came from, where others are refused
        self._ready = _Ready()

    # Workers.

    def check(self, info: WorkerInfo, *, any_live: bool) -> None:
        """Of a worker that registers. Raises RequestRefused if it does not belong here."""
        if info.model != self._model_name:
            raise refuse(
                Code.FAILED_PRECONDITION,
                f"worker {info.key.worker_id} serves {info.model!r}, this router {self._model_name!r}; "
                "give both the same model and served_model_name",
            )
        if self._beside or info.key in self._cluster.workers or not info.model_identity:
            return
        other = self._cluster.of_another_model(info)
        if other is not None and info.unquantized_identity and info.unquantized_identity == other.unquantized_identity:
            raise refuse(Code.FAILED_PRECONDITION, _quantized_otherwise(info, other))
        if other is not None:
            raise refuse(
                Code.FAILED_PRECONDITION,
                f"worker {info.key.worker_id} holds other weights ({_short(info)}) than "
                f"{other.key.worker_id}, which serves here ({_short(other)}); give both the same "
                "checkpoint, engine.quantization and engine.kv_dtype, stop the others first, or set "
                "router.other_weights: beside for an upgrade",
            )
        weights = (self._cluster.mixed and info.unquantized_identity) or info.model_identity
        if self._weights not in ("", weights) and any_live:
            raise refuse(
                Code.FAILED_PRECONDITION,
                f"worker {info.key.worker_id} holds other weights ({_short(info)}) than those that live "
                "requests began with; it is taken when these have ended",
            )
        self._weights = weights

    # Requests.

    def in_turn(self, begun_on: str = "") -> Sequence[str]:
        """Revisions to answer a request from: the first that has time for it. `begun_on`: that of an answer which broke
        off elsewhere. Raises RequestRefused.
        """
        ready = self._look()
        if begun_on:
            if ready.by_revision and begun_on not in ready.by_revision:
                raise RequestRefused(_gone(begun_on))
            return (begun_on,)
        able = ready.able
        if len(able) < 2:
            return tuple(able) or ("",)
        return sorted(able, key=lambda revision: self._rng.random() ** (1 / able[revision]), reverse=True)

    def others(self, revision: str) -> frozenset[WorkerKey]:
        """The ready workers that must not answer a request of this one."""
        ready = self._look()
        if not revision or (len(ready.by_revision) == 1 and revision in ready.by_revision):
            return NOBODY
        found = ready.others.get(revision)
        if found is None:
            found = frozenset(key for r, keys in ready.by_revision.items() if r != revision for key in keys)
            ready.others = {revision: found, **dict(list(ready.others.items())[:_FEW])}
        return found

    def unable(
        self, *, masks_tokens: bool, scores_prompts: bool = False, beams: bool = False, adapter: str = ""
    ) -> frozenset[WorkerKey]:
        """The ready workers that would ignore what a request asks for, because they are of an older version, or that
        do not have its adapter.
        """
        unable = self._look().maskless if masks_tokens else NOBODY
        if scores_prompts:
            unable |= self._look().scoreless
        if beams:
            unable |= self._look().beamless
        return unable | self._adapters.lacking(adapter) if adapter else unable

    def load_ms(self, adapter: str) -> Callable[[WorkerKey], float] | None:
        return self._adapters.load_ms(adapter)

    def cached_tokens(self, prompt: Sequence[int], cache_salt: str, adapter: str = "") -> Mapping[WorkerKey, int]:
        """By worker, the leading prompt tokens that its cache is believed to hold."""
        prefixes = self._cluster.prefixes
        if not len(prefixes):
            return {}
        hits: list[Mapping[WorkerKey, int]] = []
        for fingerprint, block_tokens, original in self._look().layouts:
            long = 0 < original < len(prompt)
            root = hint_root(fingerprint, block_tokens, cache_salt, long=long, adapter=adapter)
            hits.append(prefixes.match(prefix_hints(prompt, block_tokens, root), block_tokens))
        if len(hits) == 1:
            return hits[0]
        return {key: tokens for found in hits for key, tokens in found.items()}

    def _look(self) -> _Ready:
        view, workers = self._cluster.view(), self._cluster.workers
        at = (view.decode.changes, view.prefill.changes)
        if self._ready.at == at:
            return self._ready
        layouts: dict[str, tuple[str, int, int]] = {}
        by_revision: defaultdict[str, set[WorkerKey]] = defaultdict(set)
        maskless: set[WorkerKey] = set()
        scoreless: set[WorkerKey] = set()
        beamless: set[WorkerKey] = set()
        counts: dict[str, Counter[str]] = {}
        for name, pool in (("decode", view.decode), ("prefill", view.prefill)):
            for w in pool:
                info, layout = workers[w.key].info, w.layout_fingerprint
                layouts.setdefault(layout, (layout, w.block_tokens, info.original_context_tokens))
                by_revision[self._revision_of(info)].add(w.key)
                if not info.masks_tokens:
                    maskless.add(w.key)
                if not info.scores_prompts:
                    scoreless.add(w.key)
                if name == "decode" and not info.searches_beams:  # any prefill worker will do
                    beamless.add(w.key)
            counts[name] = Counter(self._revision_of(workers[w.key].info) for w in pool)
        by_revision.pop("", None)
        able = {r: n for r, n in counts["decode"].items() if r}
        complete = {r: n for r, n in able.items() if r in counts["prefill"]}
        if len(by_revision) > 1:
            log.info("revisions side by side: %s", ", ".join(f"{r[:8]} ({len(k)})" for r, k in by_revision.items()))
        frozen = {r: frozenset(keys) for r, keys in by_revision.items()}
        unable = frozenset(maskless), frozenset(scoreless), frozenset(beamless)
        self._ready = _Ready(at, tuple(layouts.values()), frozen, complete or able, *unable)
        return self._ready


def _quantized_otherwise(info: WorkerInfo, other: WorkerInfo) -> str:
    here = info.weights or "not quantized"
    there = other.weights or "not quantized"
    said = f"the weights of worker {info.key.worker_id} ({here}) are quantized otherwise than those of "
    said += f"{other.key.worker_id} ({there}), which serves here; give both the same engine.quantization and "
    said += "engine.quantized_groups, stop the others first, or set "
    if info.pairs_with(other):
        return said + (
            "router.mixed_quantization: true, which lets both serve and withdraws the claim that answers are those of "
            "one engine (router.other_weights: beside is for an upgrade)"
        )
    return said + (
        "router.mixed_quantization: true and, which it needs, the same engine.block_tokens for both "
        "(router.other_weights: beside is for an upgrade)"
    )


def _gone(revision: str) -> Failure:
    return Failure(
        Code.UNAVAILABLE,
        f"this answer began on a revision of the model ({revision[:8]}) of which no worker is ready here, and another "
        "one would answer differently; retry, or ask anew without what has come",
        retry_after_ms=_COME_AGAIN_MS,
    )
