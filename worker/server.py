"""A worker process: engine thread, transport, gRPC server and registration, started and stopped in order.

Start: load the model -> register KV memory -> start the engine thread -> listen -> warm up -> register with routers.
Stop:  drain (no new work, what is here ends, leases are pulled) -> leave the routers -> close streams -> engine
       thread -> transport. The KV memory stays mapped until the process is gone: a peer may still be reading it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc
from diptych.v1 import handoff_pb2_grpc, worker_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from engine.block_pool import BlockPool
from engine.core import EngineCore
from engine.runner import ModelRunner
from kv_transfer.clients import PeerLinks
from kv_transfer.handoff import PeerHello, PeerId
from kv_transfer.layout import KvLayout
from kv_transfer.service import HandoffServicer
from kv_transfer.transport import KvTransport
from worker.clients import Registration, WorkerCard
from worker.core import WorkerCore
from worker.loop import StepLoop
from worker.messages import Drain, Outbox
from worker.service import WorkerServicer
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)
