"""Both parts of a worker over one engine: it computes prompts for others (prefill_worker/core.py) and goes on with what
others computed (decode_worker/core.py). What it does is what routers send it.
"""

from __future__ import annotations

from decode_worker.core import DecodeCore
from engine.core import EngineCore
from kv_transfer.paths import PathMonitor
from kv_transfer.reader import HandoffReader
from kv_transfer.source import HandoffSource
from prefill_worker.core import PrefillCore
from worker.peer_core import PeerCore


class ElasticCore(PrefillCore, DecodeCore):
    def __init__(
        self,
        engine: EngineCore,
        source: HandoffSource,
        reader: HandoffReader,
        *,
        report_every_s: float,
        room_wait_s: float,
        deadline_grace_s: float = 1.0,
        paths: PathMonitor | None = None,
    ) -> None:
        PeerCore.__init__(
            self, engine, source, reader, paths=paths, report_every_s=report_every_s, deadline_grace_s=deadline_grace_s
        )
        self._init_serving(source)
        self._init_following(reader, room_wait_s)
