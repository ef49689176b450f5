"""The Ray Serve application with workers whose steps take the time of a larger model's (tests/support/paced_worker.py):
`import_path: tests.support.paced_app:build`, and PACE in the environment of the replicas.
"""

from __future__ import annotations

from typing import Any

from ray import serve

import deploy.app
import elastic_worker.server
from tests.support import paced_worker

elastic_worker.server.serve = paced_worker.serve  # in every process that has one of these classes


@serve.deployment(name="PrefillWorker")
class PacedPrefill(deploy.app._Worker):
    role = "prefill"


@serve.deployment(name="DecodeWorker")
class PacedDecode(deploy.app._Worker):
    role = "decode"


def build(args: dict[str, Any]) -> serve.Application:
    deploy.app.PrefillWorker, deploy.app.DecodeWorker = PacedPrefill, PacedDecode  # type: ignore[assignment]
    return deploy.app.build(args)
