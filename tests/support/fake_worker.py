"""A small real WorkerService: any router may dispatch to it; every sequence gets a token every `period_s`.

Token ids carry the time of sending, in tenths of a millisecond modulo 40,000 (four seconds), so that a client can tell
how long a token was on its way. This runs one:
    python -m tests.support.fake_worker ROUTER_INTERNAL_ADDRESS PERIOD_MS MODEL [TOKEN_ID]
(with the section `security:` as JSON in $FAKE_WORKER_SECURITY, if any)
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import deque
from collections.abc import AsyncIterator

import grpc
import numpy as np
from diptych.v1 import cluster_pb2, generate_pb2, worker_pb2, worker_pb2_grpc

from settings.security import SecurityConfig
from settings.tls import Wiring
from worker.clients import Registration, WorkerCard

TICKS = 40_000
TICK_S = 1e-4


def stamp() -> int:
    return int(time.monotonic() / TICK_S) % TICKS


def age_s(token_id: int) -> float:
    return ((stamp() - token_id) % TICKS) * TICK_S


def made_up(start: worker_pb2.StartSequence) -> generate_pb2.PromptLogprobs:
    """Prompt token i has log-probability -i / 8 and rank i; its alternatives are the tokens i, i + 1, ..."""
    count, width = len(start.prompt) // 4 - 1, start.sampling.prompt_logprobs
    return generate_pb2.PromptLogprobs(
        position=1,
        logprobs=[-(i + 1) / 8 for i in range(count)],
        ranks=range(1, count + 1),
        alternatives=width,
        top_token_ids=[i + 1 + j for i in range(count) for j in range(width)],
        top_logprobs=[-j / 4 for _ in range(count) for j in range(width)],
    )


def found_by(start: worker_pb2.StartSequence) -> worker_pb2.BeamAnswers:
    """Of a search: answer i is `max_tokens` times the token 40 + i."""
    s = start.sampling
    answers = [
        worker_pb2.BeamAnswer(token_ids=np.full(s.max_tokens, 40 + i, dtype="<u4").tobytes(), score=-i / 8)
        for i in range(s.beams.answers)
    ]
    return worker_pb2.BeamAnswers(sequence_id=start.sequence_id, answers=answers)


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, epoch: int, period_s: float, token_id: int | None = None, late_s: float = 0.0) -> None:
        """`token_id`: every token, in place of a time. `late_s`: of the first step, so that many do not step as one."""
        self._late_s = late_s
        self._epoch = epoch
        self._token_id = token_id
        self._period_s = period_s
        self.starts: deque[worker_pb2.StartSequence] = deque(maxlen=64)  # the last ones

    async def Connect(
        self, request_iterator: AsyncIterator[worker_pb2.ConnectRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.ConnectResponse]:
        live: dict[int, list[int]] = {}  # sequence -> [position, max_tokens, logprobs]
        reading = asyncio.create_task(self._read(request_iterator, live))
        load = cluster_pb2.WorkerLoad(total_blocks=1 << 20, free_blocks=1 << 20, prefill_tokens_per_s=1e6, step_ms=10)
        yield worker_pb2.ConnectResponse(epoch=self._epoch, worker_id="fake", load=load)
        try:
            loop = asyncio.get_running_loop()
            due = loop.time() + self._late_s
            while not reading.done():
                due = max(due + self._period_s, loop.time())
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not live:
                    continue
                response = worker_pb2.ConnectResponse(epoch=self._epoch)
                for start in [s for s in self.starts if s.sequence_id in live and not live[s.sequence_id][0]]:
                    if start.sampling.HasField("prompt_logprobs"):
                        response.prompt_logprobs.add(sequence_id=start.sequence_id, logprobs=made_up(start))
                for start in [s for s in self.starts if s.sequence_id in live and s.sampling.HasField("beams")]:
                    del live[start.sequence_id]
                    response.beams.append(found_by(start))
                    response.ends.add(sequence_id=start.sequence_id, reason=generate_pb2.FINISH_REASON_LENGTH)
                ids = [i for i in live if live[i][1]]
                response.sequence_ids.extend(ids)
                response.positions.extend([live[i][0] for i in ids])
                response.token_ids.extend([stamp() if self._token_id is None else self._token_id] * len(ids))
                for i in ids:
                    if live[i][2] >= 0:
                        top = [generate_pb2.TopLogprob(token_id=t, logprob=-t) for t in range(live[i][2])]
                        one = generate_pb2.TokenLogprobs(logprob=-1.0, top=top)
                        response.logprobs.add(sequence_id=i, position=live[i][0], logprobs=one)
                for i in list(live):
                    live[i][0] += 1
                    if live[i][0] >= live[i][1]:
                        del live[i]
                        response.ends.add(sequence_id=i, reason=generate_pb2.FINISH_REASON_LENGTH)
                yield response
        finally:
            reading.cancel()

    async def _read(self, requests: AsyncIterator[worker_pb2.ConnectRequest], live: dict[int, list[int]]) -> None:
        async for request in requests:
            for start in request.starts:
                self.starts.append(start)
                live[start.sequence_id] = [
                    len(start.emitted) // 4,
                    start.sampling.max_tokens,
                    start.sampling.logprobs,
                ]
            for cancel in request.cancels:
                live.pop(cancel.sequence_id, None)


async def join(
    router: str,
    wiring: Wiring,
    period_s: float,
    model: str,
    *,
    worker_id: str = "fake",
    role: str = "decode",
    context_limit_tokens: int = 8192,
    token_id: int | None = None,
    late_s: float = 0.0,
) -> tuple[grpc.aio.Server, Registration]:
    """One more worker of this process. Both are to be kept: neither outlives its last reference."""
    server, epoch = grpc.aio.server(), time.time_ns()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(FakeWorker(epoch, period_s, token_id, late_s), server)
    port = wiring.listen(server, "127.0.0.1:0", public=False)
    await server.start()
    card = WorkerCard(
        worker_id=worker_id,
        epoch=epoch,
        role=role,
        address=f"127.0.0.1:{port}",
        model=model,
        layout_fingerprint="fake",
        block_tokens=32,
        block_bytes=1,
        total_blocks=1 << 20,
        context_limit_tokens=context_limit_tokens,
        vocab_size=49152,
        transport="fake",
        attention_backend="fake",
        device="fake",
    )
    registration = Registration(card, lambda: [router], wiring)
    registration.start()
    return server, registration


async def serve(router: str, period_s: float, model: str, token_id: int | None = None) -> None:
    security = json.loads(os.environ.get("FAKE_WORKER_SECURITY") or "{}")
    wiring = Wiring(SecurityConfig.model_validate(security), "worker")
    kept = await join(router, wiring, period_s, model, token_id=token_id)
    await kept[0].wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], float(sys.argv[2]) / 1e3, sys.argv[3], *map(int, sys.argv[4:])))
