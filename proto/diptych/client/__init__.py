"""The Python client of Diptych: typed, for threads and for asyncio, thin over the stubs of `diptych.v1`.

    from diptych.client import Client

    with Client("localhost:8100") as client:
        print(client.generate("Why is the sky blue?", max_tokens=40).text)

        with client.stream([{"role": "user", "content": "Tell me a story."}], temperature=0.8) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
        print(stream.answer.usage.completion_tokens, stream.answer.route.rule)

    async with AsyncClient("localhost:8100") as client:
        answer = await client.generate("Why is the sky blue?")

Several routers are one: `Client("a:8100,b:8100")` spreads requests over them and goes on elsewhere when one leaves.

A broken stream is resumed. When the router dies or restarts in the middle of an answer, the client sends the request
again with the tokens that have come and the seed that was drawn, and the router goes on at the next position: the
answer is, token for token, the one that an undisturbed router would have given, and no chunk comes twice.

What may help is retried: a router that is not there or is leaving, a broken connection, a refusal with a retry hint
(which is kept). `Retrying` bounds it, for a request and for all of a client's together. Everything else, and what is
left over, is `RequestFailed` with the status, the cause, the fix, and the part of the answer that had come.

Needs grpcio and googleapis-common-protos beside protobuf; no torch, and nothing else of Diptych.
"""

from diptych.client._aio import AsyncClient, AsyncStream
from diptych.client._routers import addresses_of
from diptych.client._sync import Client, Stream
from diptych.client.types import NO_RETRIES, Answer, Chunk, Options, Prompt, RequestFailed, Retrying

__all__ = [
    "NO_RETRIES",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Chunk",
    "Client",
    "Options",
    "Prompt",
    "RequestFailed",
    "Retrying",
    "Stream",
    "addresses_of",
]
