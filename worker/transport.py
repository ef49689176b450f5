"""The KV transport of a worker: NIXL in each of its ranks, one transport to everybody else (kv_transfer/ranked.py)."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace

from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerId
from kv_transfer.layout import KvLayout
from kv_transfer.nixl_transport import NixlTransport
from kv_transfer.rank_link import LinkedRank, RankFailed
from kv_transfer.ranked import RankedTransport, RankTransport
from kv_transfer.transport import KvMemory, TransportEvent


def open_transport(
    peer: PeerId,
    layout: KvLayout,
    config: TransportConfig,
    memory: KvMemory,
    links: Sequence[socket.socket],
    deliver: Callable[[TransportEvent], None],
) -> RankedTransport:
    """`memory` is the leader's; `links` lead to the other ranks, in their order. Raises RankFailed."""
    if links and config.digest:
        raise RankFailed("transport.digest is of whole blocks, and this worker's ranks hold parts of them; turn it off")
    ranked = RankedTransport(peer, layout, 1 + len(links), deliver)
    ranks: list[RankTransport] = [NixlTransport(peer, config, functools.partial(ranked.hear, 0))]
    for rank, link in enumerate(links, 1):
        other = LinkedRank(link, replace(peer, rank=rank), functools.partial(ranked.hear, rank))
        ranks.append(other)
        other.open(config)
    ranked.attach(ranks, memory)
    return ranked
