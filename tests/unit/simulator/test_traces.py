from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from simulator.spec import ClusterSpec
from simulator.traces import Trace, TraceError, TraceRequest, at_rate, read, repeated, servegen, shortened, window

MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [0, 3]},
]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_mooncake_is_spread_inside_its_bins_alike_for_one_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, MOONCAKE)))
    trace = read(path, random.Random(1))
    assert [r.blocks for r in trace.requests] == [(1, 2), (1,)], "full blocks only"
    assert trace.requests[0].arrival_s == 0.0
    assert 0 < trace.requests[1].arrival_s < 6
    assert trace == read(path, random.Random(1))
    assert trace != read(path, random.Random(2))
    raw = read(path, random.Random(1), jitter=False)
    assert [r.arrival_s for r in raw.requests] == [0.0, 3.0]


def test_azure_and_length_files(tmp_path: Path) -> None:
    azure = write(
        tmp_path / "a.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.6805900,10,1\n",
    )
    trace = read(azure, random.Random(0))
    assert trace.requests[0] == TraceRequest(0.0, 374, 44)
    assert trace.requests[1].arrival_s == pytest.approx(1.0)
    lengths = write(tmp_path / "l.csv", "arrival_s,input_tokens,output_tokens\n0.5,20,3\n")
    assert read(lengths, random.Random(0)).requests == [TraceRequest(0.0, 20, 3)]


def test_a_file_of_no_known_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no known trace format"):
        read(write(tmp_path / "x", "hello"), random.Random(0))
    with pytest.raises(TraceError, match="No such file"):
        read(tmp_path / "absent", random.Random(0))
    with pytest.raises(TraceError, match="hash_ids"):
        read(write(tmp_path / "y", '{"timestamp": 0, "input_length": 3, "output_length": 4}'), random.Random(0))


def test_servegen_draws_the_rate_of_its_windows() -> None:
    client = {
        "windows": [[0, 20.0, 1.0, "Gamma", 1.0, 0.05], [600, 0.0, 1.0, "Gamma", 1.0, 1.0]],
        "input_q64": [10] * 64,
        "output_q64": [2] * 64,
    }
    trace = servegen({"clients": [client]}, "s", random.Random(3))
    assert len(trace.requests) == pytest.approx(20 * 600, rel=0.05)
    assert trace.duration_s < 600


TRACE = Trace("t", [TraceRequest(float(i), 1024, 10, (1, i + 2)) for i in range(100)])


def test_scaling_keeps_the_requests() -> None:
    faster = at_rate(TRACE, 4.0)
    assert faster.requests_per_s == pytest.approx(4.0)
    assert [r.blocks for r in faster.requests] == [r.blocks for r in TRACE.requests]
    short = shortened(TRACE, 8)
    assert short.block_tokens == 64
    assert (short.requests[0].prompt_tokens, short.requests[0].output_tokens) == (128, 2)
    part = window(TRACE, 10, random.Random(1))
    assert (len(part.requests), part.requests[0].arrival_s) == (10, 0.0)


def test_repeats_share_no_prefix_and_keep_the_rate() -> None:
    longer = repeated(TRACE, 250)
    assert len(longer.requests) == 250
    assert longer.requests_per_s == pytest.approx(1.0, rel=0.01)
    assert not {b for r in longer.requests[:100] for b in r.blocks} & {
        b for r in longer.requests[100:200] for b in r.blocks
    }


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("inf,3,5", "arrival inf s"),
        ("nan,3,5", "arrival nan s"),
        ("1,-7,5", "-7 input"),
        ("1,ten,5", "invalid literal"),
        ("1,3", "int()"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(f"arrival_s,input_tokens,output_tokens\n0,10,5\n{line}\n")
    with pytest.raises(TraceError) as refused:
        read(path, random.Random(1))
    assert "line 3" in str(refused.value)
    assert why in str(refused.value)


def test_a_cluster_without_decode_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing answers without a decode worker"):
        ClusterSpec.model_validate({"decode": {"workers": 0}})
