"""KV on its way between fast workers: announced chunk by chunk, room at the reader, both NICs, adoption.

P: first chunk ─> room at D? ─ yes ─> what is announced moves ─ ... ─ all of it arrived, `handoff_ms` ─> D adopts
                      └─ no ─> waits in line at D until blocks become free
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from router.placement.cluster import Cluster
from simulator.cost_model import CostModel
from simulator.flights import BLOCK_TOKENS, FastWorker, Flight, present
from simulator.jobs import Job
from simulator.leap_worker import LeapWorker
from simulator.loop import EventLoop
from simulator.network import move
from simulator.spec import ClusterSpec


class Handoffs:
    def __init__(
        self, loop: EventLoop, spec: ClusterSpec, costs: CostModel, cluster: Cluster, workers: Sequence[FastWorker]
    ) -> None:
        self.loop, self.spec, self.costs, self.cluster, self.workers = loop, spec, costs, cluster, workers

    def chunk(self, engine: LeapWorker, job: Job, tokens: int, first_end_s: float, last_tokens: int) -> None:
        """Whole blocks are announced after every step, P's cached ones with the first."""
        if job.computed >= BLOCK_TOKENS:
            self._announce(job.flight, job.computed - job.computed % BLOCK_TOKENS, first_end_s, last_tokens)

    def computed(self, flight: Flight) -> None:
        """The rest; it queues behind what other prompts of the same step announced."""
        flight.all_sent = True
        self._announce(flight, flight.request.prompt_tokens, self.loop.now, BLOCK_TOKENS)

    def _announce(self, flight: Flight, tokens: int, first_ready_s: float, last_tokens: int) -> None:
        flight.moved_tokens = tokens
        if flight.first_chunk_s < 0:
            flight.first_chunk_s = first_ready_s
            self._reserve(flight)
        if flight.reserved:
            self._send(flight, first_ready_s, last_tokens)

    def _reserve(self, flight: Flight) -> bool:
        decode, job = flight.decode, flight.decode_job
        assert decode is not None
        assert job is not None
        if decode.engine.reserve(job):
            flight.reserved = True
            decode.held_tokens -= job.prompt_tokens
            flight.sent_tokens = job.computed  # cached there: not sent
            return True
        decode.no_room.append(flight)
        return False

    def room(self, engine: LeapWorker) -> None:
        worker = self.workers[engine.index]
        while worker.no_room:
            flight = worker.no_room[0]
            if not worker.engine.reserve(present(flight.decode_job)):
                return
            worker.no_room.pop(0)
            flight.reserved = True
            worker.held_tokens -= flight.request.prompt_tokens
            flight.sent_tokens = present(flight.decode_job).computed
            self._send(flight, self.loop.now, flight.moved_tokens)

    def _send(self, flight: Flight, first_ready_s: float, last_tokens: int) -> None:
        """All that is announced and not sent yet; then, if that was all, adoption."""
        self._move(flight, first_ready_s, last_tokens)
        if flight.all_sent:
            self.loop.at(max(flight.arrives_s, self.loop.now) + self.spec.handoff_ms / 1e3, self._adopt, flight)

    def _move(self, flight: Flight, first_ready_s: float, last_tokens: int) -> None:
        tokens = flight.moved_tokens - flight.sent_tokens
        if tokens <= 0:
            flight.arrives_s = self.loop.now if flight.arrives_s == math.inf else flight.arrives_s
            return
        per_token = self.costs.kv_bytes_per_token
        last = min(tokens, last_tokens)
        source, sink = present(flight.prefill), present(flight.decode)
        now = self.loop.now
        flight.arrives_s = move(source.nic, sink.nic, tokens * per_token, first_ready_s, now, last * per_token)
        sink.pull_bytes_per_s = min(source.nic.bytes_per_s, sink.nic.bytes_per_s)
        flight.sent_tokens = flight.moved_tokens

    def _adopt(self, flight: Flight) -> None:
        decode, prefill = flight.decode, flight.prefill
        if decode is None or prefill is None or not decode.engine.alive or flight.outcome.finished:
            return
        if prefill.flights.pop(flight.outcome.number, None) is not None:
            prefill.engine.give_back(present(flight.prefill_job))
        self.cluster.computed(decode.key, flight.decode_leg)
        if not flight.outcome.moves:
            actual_ms = (self.loop.now - flight.outcome.first_token_s) * 1e3
            predicted_ms = flight.estimates["uncorrected_handoff_ms"]
            self.cluster.learned_handoff(decode.key, predicted_ms, actual_ms, self.loop.now)
        decode.engine.adopt(present(flight.decode_job), flight.outcome.first_token_s)

    @staticmethod
    def forget_reservation(flight: Flight, decode: FastWorker) -> None:
        if flight.reserved and flight.decode_job is not None:
            decode.engine.give_back(flight.decode_job)
        elif not flight.reserved:
            decode.held_tokens -= flight.request.prompt_tokens
            decode.no_room = [f for f in decode.no_room if f is not flight]
