"""One set of weights behind a router: a request may go on with any of its workers."""

from __future__ import annotations

from router.errors import Code, refuse
from router.placement.cluster import Cluster, WorkerInfo


class SameWeights:
    def __init__(self, cluster: Cluster, model_name: str) -> None:
        self._cluster = cluster
        self._model_name = model_name
        self._identity = ""  # of the weights that answers come from

    def check(self, info: WorkerInfo, *, any_live: bool) -> None:
        """Of a worker that registers. Raises RequestRefused if it does not belong here."""
        if info.model != self._model_name:
            raise refuse(
                Code.FAILED_PRECONDITION,
                f"worker {info.key.worker_id} serves {info.model!r}, this router {self._model_name!r}; "
                "give both the same model and served_model_name",
            )
        if info.key in self._cluster.workers or not info.model_identity:
            return
        other = self._cluster.of_another_model(info)
        if other is not None:
            raise refuse(
                Code.FAILED_PRECONDITION,
                f"worker {info.key.worker_id} holds other weights ({info.model_identity[:8]}) than "
                f"{other.key.worker_id}, which serves here ({other.model_identity[:8]}); give both the same "
                "checkpoint, or stop the others first",
            )
        if self._identity not in ("", info.model_identity) and any_live:
            raise refuse(
                Code.FAILED_PRECONDITION,
                f"worker {info.key.worker_id} holds other weights ({info.model_identity[:8]}) than those that live "
                "requests began with; it is taken when these have ended",
            )
        self._identity = info.model_identity
