"""Our NIXL agent and our memory, registered with it. The only file that imports NIXL.

    blocks         the KV pools: one list over the blocks of all areas, so a block's id is its place in it
    generations    one number a block, moved after the data: the fence
    scratch        lanes of LANE_SLOTS numbers: the source's generations of one pull arrive in one lane

Made and used by the owner thread of nixl_transport.py only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kv_transfer.config import TransportConfig
from kv_transfer.handoff import PeerId
from kv_transfer.nixl_endpoint import NixlEndpoint, host_identity
from kv_transfer.rdma import NoRdma, ucx_variables, usable_ports
from kv_transfer.transport import KvArea, KvMemory
from settings.listeners import declare, listening

log = logging.getLogger(__name__)

Runs = Sequence[Sequence[tuple[int, int]]]  # by area: offset in a block, and bytes
LANES = 64  # pulls at once that have a place for their generations
LANE_SLOTS = 256  # blocks in one pull, at most


class NixlUnavailable(ImportError):
    """NIXL is not installed, or has not what it needs; the message says what to do."""


def _load_nixl() -> Any:
    for module in ("nixl_cu12._api", "nixl_cu13._api", "nixl._api"):
        with contextlib.suppress(ImportError):
            return __import__(module, fromlist=["nixl_agent"])
    raise NixlUnavailable(
        "NIXL is not installed; run `make setup`, or `pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1`"
    )


@contextlib.contextmanager
def _step(what: str, hint: str) -> Iterator[None]:
    """Raises NixlUnavailable in place of NIXL's errors, which are of classes in its own module alone."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        why = f"NIXL could not {what} ({said}); UCX may say why on standard error, above. {hint}"
        raise NixlUnavailable(why) from error


def _hint_on_opening() -> str:
    devices, transports = os.environ.get("UCX_NET_DEVICES", ""), os.environ.get("UCX_TLS", "")
    hint = "If it names a network interface: "
    if devices:
        hint += f"transport.ucx_net_devices is {devices}: name interfaces of this host, or leave it out"
    else:
        hint += "one must be up, and /sys be mounted"
    if transports:
        hint += f". If it names a transport: transport.ucx_tls is {transports}"
    return f"{hint}. If it names the plugin: install nixl and nixl-cu12 of one version"


def _hint_on_memory(kind: str) -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    hint = f"RDMA locks memory, and the limit (`ulimit -l`) is {limit}"
    hint += "" if soft == resource.RLIM_INFINITY else ": raise it to unlimited"
    if kind == "VRAM":
        hint += "; for GPU memory the host needs dma-buf or the module nvidia_peermem (`lsmod`), and UCX with CUDA"
    return f"{hint}. Without RDMA: transport.ucx_tls without rc, dc and ud"


class NixlAgent:
    """`nixl` is NIXL's own object; `blocks`, `generations` and `lanes` (of scratch) are descriptor lists of ours."""

    def __init__(self, peer: PeerId, config: TransportConfig, memory: KvMemory) -> None:
        _set_environment(config)
        api = _load_nixl()
        self.memory = memory
        self.scratch = np.zeros(LANES * LANE_SLOTS, dtype=np.uint64)
        before = set(listening(os.getpid()))
        with _step("open UCX", _hint_on_opening()):
            self.nixl = api.nixl_agent(agent_name(peer), api.nixl_agent_config(enable_prog_thread=False))
        for _, port in set(listening(os.getpid())) - before:
            declare(port, "UCX (KV)", "none", encrypted=False)
        self.kind = kind = "DRAM" if memory.device == "cpu" else "VRAM"
        self.device = device = 0 if memory.device == "cpu" else int(memory.device.split(":")[1])
        generations, scratch = _address(memory.generations), _address(self.scratch)
        pools = [(area.base_address, area.block_bytes * area.num_blocks, device, "") for area in memory.areas]
        numbers = [(generations, memory.generations.nbytes, 0, ""), (scratch, self.scratch.nbytes, 0, "")]
        size = f"{sum(size for _, size, *_ in pools) / (1 << 30):.1f} GiB of {memory.device} memory"
        with _step(f"register the KV pools, {size}", _hint_on_memory(kind)):
            self._registered = [self.nixl.register_memory(pools, kind)]
        with _step("register the generations and the scratch lanes", _hint_on_memory("DRAM")):
            self._registered += [self.nixl.register_memory([one], "DRAM") for one in numbers]
        with _step(f"prepare the list of {memory.num_blocks} KV blocks", _hint_on_memory(kind)):
            self.blocks = self.prepare("", kind, memory.areas, device)
        with _step("prepare the lists of generations and scratch lanes", _hint_on_memory("DRAM")):
            self.generations = self.prepare("", "DRAM", (KvArea(generations, 8, memory.num_blocks),), 0)
            self.lanes = self.prepare("", "DRAM", (KvArea(scratch, 8, len(self.scratch)),), 0)
        self.endpoint = NixlEndpoint(
            host=host_identity(),
            areas=memory.areas,
            generations_address=generations,
            scratch_address=scratch,
            scratch_slots=len(self.scratch),
            device=-1 if memory.device == "cpu" else device,
            metadata=self.nixl.get_agent_metadata(),
        )

    def prepare(self, agent: str, kind: str, areas: Sequence[KvArea], device: int, runs: Runs | None = None) -> Any:
        """A descriptor per block, once per memory and peer; transfers then name indices only.

        `runs`: one for each of these runs of bytes of every block; None: blocks are whole.
        """
        if runs is None:
            runs = [[(0, area.block_bytes)] for area in areas]
        rows = np.empty((sum(a.num_blocks * len(r) for a, r in zip(areas, runs, strict=True)), 3), dtype=np.uint64)
        rows[:, 2] = device
        first = 0
        for area, of_area in zip(areas, runs, strict=True):
            if not of_area:
                continue
            own = rows[first : first + area.num_blocks * len(of_area)]
            offsets, sizes = np.asarray(of_area, dtype=np.uint64).T
            blocks = area.base_address + np.arange(area.num_blocks, dtype=np.uint64) * np.uint64(area.block_bytes)
            own[:, 0] = (blocks[:, None] + offsets).reshape(-1)
            own[:, 1] = np.tile(sizes, area.num_blocks)
            first += len(own)
        return self.nixl.prep_xfer_dlist(agent, rows, kind)

    def post(self, operation: str, own: Any, own_ids: Any, their: Any, their_ids: Any, message: bytes = b"") -> Any:
        """Begin a transfer; the peer is notified with `message`, if there is one, when it is done."""
        own_ids, their_ids = np.asarray(own_ids, dtype=np.int32), np.asarray(their_ids, dtype=np.int32)
        handle = self.nixl.make_prepped_xfer(operation, own, own_ids, their, their_ids, message)
        self.nixl.transfer(handle)
        return handle

    def ended(self, handle: Any) -> str | None:
        """How a transfer ended, "DONE" or "ERR", and its handle is released; None while it is under way."""
        state = self.nixl.check_xfer_state(handle)
        if state == "PROC":
            return None
        self.nixl.release_xfer_handle(handle)
        return state


def _set_environment(config: TransportConfig) -> None:
    if config.ucx_tls:
        os.environ["UCX_TLS"] = config.ucx_tls
    if config.ucx_net_devices == "rdma":
        try:
            found = ucx_variables(usable_ports())
        except NoRdma as error:
            raise NixlUnavailable(f"transport.ucx_net_devices is rdma: {error}") from None
        log.info("RDMA: %s", ", ".join(f"{name}={value}" for name, value in found.items()))
        os.environ.update(found)
    elif config.ucx_net_devices:
        os.environ["UCX_NET_DEVICES"] = config.ucx_net_devices
    os.environ.setdefault("UCX_TCP_CONN_NB", "y")  # connecting to a host that does not answer blocks nobody
    os.environ.setdefault("UCX_TCP_SYN_CNT", "2")
    # A cut link ends a read in seconds rather than never. The keepalive interval itself must stay as it is.
    os.environ.setdefault("UCX_TCP_KEEPIDLE", "1s")
    os.environ.setdefault("UCX_TCP_KEEPINTVL", "1s")
    os.environ.setdefault("UCX_TCP_KEEPCNT", "2")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")


def agent_name(peer: PeerId) -> str:
    """Named per incarnation: NIXL refuses a restart under the same name. Who answers under another rank's name is found
    out: the name is in the metadata.
    """
    return f"{peer.worker_id}@{peer.epoch}" + (f"/{peer.rank}" if peer.rank else "")


def _address(array: np.ndarray) -> int:
    return int(array.ctypes.data)
