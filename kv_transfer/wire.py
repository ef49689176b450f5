"""handoff.proto <-> kv_transfer/handoff.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diptych.v1 import generate_pb2, handoff_pb2

from kv_transfer.block_hash import HASH_BYTES
from kv_transfer.handoff import (
    MAX_GROUPS,
    Acceptance,
    BlocksAnnounced,
    FinalAnnounced,
    Follow,
    Lend,
    PeerHello,
    PeerId,
    ReaderMessage,
    RefusalReason,
    Refused,
    Release,
    Renew,
    SourceMessage,
    TokenLogprobs,
)
from settings.versions import OURS


def hello_to_wire(hello: PeerHello, ticket: bytes = b"", *, mixes: bool = False) -> handoff_pb2.PeerHello:
    return handoff_pb2.PeerHello(
        worker_id=hello.peer.worker_id,
        epoch=hello.peer.epoch,
        layout_fingerprint=hello.layout_fingerprint,
        transport=hello.transport,
        endpoint=hello.endpoint,
        pairing_fingerprint=hello.pairing,
        mixes_weights=mixes,
        ticket=ticket,
        protocol=OURS.version,
        oldest_protocol=OURS.oldest,
    )


def hello_from_wire(m: handoff_pb2.PeerHello) -> PeerHello:
    peer = PeerId(m.worker_id, m.epoch)
    return PeerHello(peer, m.layout_fingerprint, m.transport, m.endpoint, m.pairing_fingerprint, m.mixes_weights)


def reader_messages_to_wire(messages: Iterable[ReaderMessage]) -> handoff_pb2.AttachRequest:
    request = handoff_pb2.AttachRequest()
    for message in messages:
        match message:
            case Follow(handoff_id):
                request.follows.add(handoff_id=handoff_id)
            case Renew(handoff_id):
                request.renews.add(handoff_id=handoff_id)
            case Release(handoff_id, adopted):
                request.releases.add(handoff_id=handoff_id, adopted=adopted)
            case Lend(handoff_id, names):
                request.lends.add(handoff_id=handoff_id, names=b"".join(names))
    return request


def reader_messages_from_wire(m: handoff_pb2.AttachRequest) -> tuple[ReaderMessage, ...]:
    return (
        *(Follow(f.handoff_id) for f in m.follows),
        *(Lend(x.handoff_id, _names(x.names)) for x in m.lends),
        *(Renew(r.handoff_id) for r in m.renews),
        *(Release(r.handoff_id, r.adopted) for r in m.releases),
    )


def _names(data: bytes) -> tuple[bytes, ...]:
    """Bytes beyond the last whole name say nothing."""
    return tuple(data[i : i + HASH_BYTES] for i in range(0, len(data) - HASH_BYTES + 1, HASH_BYTES))


def source_messages_to_wire(messages: Iterable[SourceMessage]) -> handoff_pb2.AttachResponse:
    """Per handoff the order is announcements, final, refusal: the order in which a source can say them."""
    response = handoff_pb2.AttachResponse()
    for message in messages:
        match message:
            case BlocksAnnounced():
                response.blocks.add(
                    handoff_id=message.handoff_id,
                    first_index=message.first_index,
                    block_ids=message.block_ids,
                    generations=message.generations,
                    digests=message.digests,
                    group=message.group,
                )
            case FinalAnnounced():
                final = response.finals.add(
                    handoff_id=message.handoff_id, num_tokens=message.num_tokens, emitted=message.emitted
                )
                if message.acceptance is not None:
                    final.acceptance.CopyFrom(acceptance_to_wire(message.acceptance))
                for value in message.logprobs:
                    final.logprobs.add(
                        logprob=value.logprob,
                        top=[generate_pb2.TopLogprob(token_id=t, logprob=p) for t, p in value.top],
                    )
            case Refused(handoff_id, reason, detail):
                response.refusals.add(handoff_id=handoff_id, reason=reason.value, detail=detail)
    return response


def acceptance_to_wire(value: Acceptance) -> handoff_pb2.DraftAcceptance:
    return handoff_pb2.DraftAcceptance(
        method=value.method, accepted=value.accepted, tried=value.tried, at_tokens=value.at
    )


def acceptance_of(m: Any) -> Acceptance | None:
    """Of a message that may have one. What cannot be one is passed over: without, it is learned again."""
    if not m.HasField("acceptance"):
        return None
    found = Acceptance(m.acceptance.method, m.acceptance.accepted, m.acceptance.tried, m.acceptance.at_tokens)
    return found if found.sound else None


def source_messages_from_wire(m: handoff_pb2.AttachResponse) -> tuple[SourceMessage, ...]:
    """Raises ValueError for a message that no source of this version sends."""
    messages: list[SourceMessage] = []
    for b in m.blocks:
        if len(b.generations) != len(b.block_ids) or len(b.digests) not in (0, len(b.block_ids)):
            raise ValueError("an announcement whose columns differ in length")
        if b.group >= MAX_GROUPS:
            raise ValueError(f"an announcement of group {b.group}")
        messages.append(
            BlocksAnnounced(
                b.handoff_id, b.first_index, tuple(b.block_ids), tuple(b.generations), tuple(b.digests), b.group
            )
        )
    for f in m.finals:
        if len(f.logprobs) > len(f.emitted):
            raise ValueError("a final announcement with more log-probabilities than tokens")
        logprobs = tuple(TokenLogprobs(p.logprob, tuple((t.token_id, t.logprob) for t in p.top)) for p in f.logprobs)
        messages.append(FinalAnnounced(f.handoff_id, f.num_tokens, tuple(f.emitted), logprobs, acceptance_of(f)))
    messages += [Refused(r.handoff_id, RefusalReason(r.reason), r.detail) for r in m.refusals]
    return tuple(messages)
