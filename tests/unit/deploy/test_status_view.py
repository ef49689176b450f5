from __future__ import annotations

import io

import pytest
from diptych.v1 import cluster_pb2, generate_pb2
from rich.console import Console

from deploy import explain_view
from deploy.status_view import render


def shown(width: int, group: str = "") -> list[str]:
    cluster = cluster_pb2.Cluster(
        router=cluster_pb2.RouterState(router_id="10.0.0.1:8100", model="smollm2-135m-instruct", serving=True),
        workers=[
            cluster_pb2.Worker(
                worker_id=f"{name}-0",
                group=group if name == "decode" else "",
                role=role,
                state=cluster_pb2.WORKER_STATE_READY,
                load=cluster_pb2.WorkerLoad(
                    running_sequences=12, waiting_sequences=134, put_back_sequences=21, prefill_backlog_tokens=123_456,
                    free_blocks=100, total_blocks=4096, cached_blocks=2000, step_ms=41.6, decode_tokens_per_s=1234,
                ),
                device="cpu bfloat16, 2 threads on processors 0,1",
                attention_backend="native stack (amx)",
                trial="native stack (amx): right at positions 0, 4090 and 8180",
            )
            for name, role in (("prefill", cluster_pb2.ROLE_PREFILL), ("decode", cluster_pb2.ROLE_DECODE))
        ],
        recent=[
            cluster_pb2.RecentRequest(
                request_id="9db0397c86b57c0a",
                route=generate_pb2.Route(
                    placement=generate_pb2.PLACEMENT_SPLIT, prefill_worker="prefill-0", decode_worker="decode-0",
                    rule="split_is_faster",
                ),
                prompt_tokens=131_072,
                completion_tokens=4096,
                timings=generate_pb2.Timings(ttft_ms=12345, handoff_gap_ms=12, total_ms=123456),
                outcome="length",
            )
        ],
    )  # fmt: skip
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(render(cluster, width=width))
    return file.getvalue().splitlines()


def test_groups_are_shown_where_there_are_some() -> None:
    (header,) = [line for line in shown(140, "h100") if "KV in use" in line]
    assert header.split()[:3] == ["role", "group", "worker"]
    assert any(line.split()[:3] == ["decode", "h100", "decode-0"] for line in shown(140, "h100"))
    assert "group" not in "".join(shown(140)).split()


@pytest.mark.parametrize("width", [80, 120])
def test_everything_shown_is_shown_whole(width: int) -> None:
    lines = shown(width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for whole in ("decode-0", "ready", "134 (21 put back)", "3996/4096", "41.6", "9db0397c86b57c0a", "131072", "4096",
                  "12345", "length", "prefill-0 → decode-0", "on processors 0,1"):  # fmt: skip
        assert whole in text
    assert ("split_is_faster" in text) == (width == 120)
    assert "tried at start: native stack (amx): right at positions 0, 4090 and 8180" in " ".join(text.split())


MOVES = [
    cluster_pb2.Migration(
        request_id="r1", source_worker="d1", target_worker="d2", reason="its worker leaves", outcome="done",
        pause_ms=31.4, pulled_bytes=2_500_000, took_ms=420,
    ),
    cluster_pb2.Migration(
        request_id="r1", source_worker="d2", target_worker="d3", reason="asked for", outcome="handoff failed: no_room",
    ),
]  # fmt: skip


def test_a_role_that_the_name_does_not_say_and_moves_are_shown() -> None:
    worker = cluster_pb2.Worker(worker_id="decode-0", role=cluster_pb2.ROLE_STANDBY)
    stopped = cluster_pb2.Migration(request_id="r2", outcome="under way", frozen_ms=12)
    cluster = cluster_pb2.Cluster(workers=[worker], migrations=[*MOVES, stopped])
    for width in (80, 120):
        file = io.StringIO()
        Console(file=file, width=width, highlight=False).print(render(cluster, width=width))
        text = file.getvalue()
        assert "standby" in text
        assert "d1 → d2" in text
        assert "handoff failed: no_room" in text
        assert "handing over" in text


def test_explain_tells_each_move() -> None:
    explanation = cluster_pb2.Explanation(request=cluster_pb2.RecentRequest(request_id="r1"), migrations=MOVES)
    text = explain_view.render(explanation)
    assert "d1 → d2   because its worker leaves: done after 420 ms, 2.5 MB pulled; the stream paused for 31 ms" in text
    assert "d2 → d3   because asked for: handoff failed: no_room" in text
    assert "it was moved, so the estimates do not apply" in text
    first, second = explain_view.to_dict(explanation)["migrations"]
    assert (first["target"], first["pause_ms"], second["pause_ms"]) == ("d2", pytest.approx(31.4), None)
