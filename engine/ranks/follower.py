"""Every rank but the first: `python -m engine.ranks.follower LINK KV_LINK STAMPS MEETING LEADER`, four descriptors and
a process that the leader gives (engine/ranks/leader.py). It loads its part of the model, then computes what it is told,
until the link closes. It decides nothing, samples nothing, and speaks to nobody but the other ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
from typing import Any

_PR_SET_PDEATHSIG = 1


def main(link_fd: int, kv_link_fd: int, stamps_fd: int, meeting_fd: int, leader: int) -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if leader and os.getppid() != leader:
        return 1  # it ended before that took hold
    for number in (signal.SIGINT, signal.SIGTERM):  # the leader drains, and ends us
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=kv_link_fd) as kv_link:
        return follow(socket.socket(fileno=link_fd), stamps_fd, meeting_fd, kv_link)


def follow(link: socket.socket, stamps_fd: int, meeting_fd: int, kv_link: socket.socket) -> int:
    """Until the link closes."""
    import torch

    from engine.config import EngineConfig
    from engine.model_errors import ModelLoadError, RankLost
    from engine.ranks.group import Group, Stamps, meeting_at
    from engine.ranks.link import Kind, receive, send
    from engine.ranks.member import Member
    from engine.ranks.place import Place
    from engine.runner import ModelRunner, device_of
    from kv_transfer.nixl_transport import NixlTransport
    from kv_transfer.rank_link import serve_rank

    said = receive(link)
    if said is None:
        return 0
    hello: dict[str, Any] = json.loads(said[1])
    config = EngineConfig.model_validate(hello["config"])
    place = Place(hello["rank"], config.tensor_parallel, config.expert_parallel)
    logging.basicConfig(level=hello["logging"], format=f"%(asctime)s %(levelname)s rank {place.rank}: %(message)s")
    device = device_of(config, place.rank)
    try:
        send(link, Kind.HERE)
        member = Member(place, Group(place, meeting_at(meeting_fd), Stamps(stamps_fd, place.degree), device))
        member.group.least([0])
        runner = ModelRunner(config, member)
    except Exception as error:
        told = str(error)
        if not isinstance(error, ModelLoadError | RankLost):
            logging.exception("%s cannot start", place)
            told = f"cannot start ({type(error).__name__}: {error})"
        with contextlib.suppress(OSError):
            send(link, Kind.REFUSED, told.encode())
        return 1
    threading.Thread(
        target=serve_rank, args=(kv_link, runner.memory(), NixlTransport), name="kv link", daemon=True
    ).start()
    send(link, Kind.READY)
    step = 0
    while (said := receive(link)) is not None:
        step += 1
        try:
            with torch.inference_mode():
                compute(runner, member, step, said[1])
        except BaseException as error:
            logging.warning("step %d fails: %s", step, error)
            _failed(link, step, member.group.calls, error)
    return 0


def compute(runner: Any, member: Any, step: int, message: bytes) -> None:
    from engine.kv_shape import copied
    from engine.ranks.message import decode

    member.group.begin(step)
    told = decode(message)
    kv = copied(runner.kv, told.chunks)
    runner.forward.forward(kv, told.token_ids, told.positions, told.chunks, told.keep)


def _failed(link: socket.socket, step: int, calls: int, error: BaseException) -> None:
    from engine.ranks.link import FAILURE, Kind, send

    with contextlib.suppress(OSError):  # the leader may be gone, which is the reason then
        send(link, Kind.FAILED, FAILURE.pack(step, calls) + f"{type(error).__name__}: {error}".encode()[:2000])


if __name__ == "__main__":
    code = main(*map(int, sys.argv[1:]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
