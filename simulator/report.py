"""What `diptych simulate` writes: report.json, and report.html that stands by itself (drawings are inline SVG)."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simulator.flights import Sample
from simulator.outcome import METRICS, Outcome, counted

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 460, 240, 52, 34
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed")

Line = tuple[str, Sequence[tuple[float, float]]]


def distribution(values: Sequence[float], points: int = 100) -> list[tuple[float, float]]:
    """Cumulative, thinned to `points`."""
    ordered = sorted(values)
    n = len(ordered)
    if n == 0:
        return []
    marks = sorted({min(n - 1, i * n // points) for i in range(points)} | {n - 1})
    return [(ordered[i], (i + 1) / n) for i in marks]


def write(
    directory: Path, result: dict[str, Any], outcomes: Sequence[Outcome], samples: Sequence[Sample]
) -> list[Path]:
    """`result` has the curve over rates and the summary of the run whose outcomes and samples are given."""
    directory.mkdir(parents=True, exist_ok=True)
    done = [o for o in counted(outcomes) if o.finished]
    data = {
        **result,
        "distributions": {
            "ttft_ms": distribution([o.ttft_s * 1e3 for o in done]),
            "tpot_ms": distribution([o.tpot_ms for o in done if o.output_tokens > 1]),
            "worst_gap_ms": distribution([o.worst_gap_ms for o in done if o.output_tokens > 1]),
        },
        "utilisation": [asdict(s) for s in samples],
    }
    paths = [directory / "report.json", directory / "report.html"]
    paths[0].write_text(json.dumps(data, indent=1) + "\n")
    paths[1].write_text(page(data))
    return paths


def page(data: dict[str, Any]) -> str:
    curve = sorted(data["curve"], key=lambda row: row["requests_per_s"])
    samples = data["utilisation"]
    distributions = data["distributions"]
    charts = [
        chart(
            "Goodput over rate",
            "requests/s offered",
            "requests/s within targets",
            [(f"{m} gap", [(r["requests_per_s"], r["goodput_requests_per_s"][m]) for r in curve]) for m in METRICS],
        ),
        chart(
            "Attainment over rate",
            "requests/s offered",
            "share within targets",
            [(f"{m} gap", [(r["requests_per_s"], r["attainment"][m]) for r in curve]) for m in METRICS],
        ),
        chart(
            "Share of requests split", "requests/s offered", "share",
            [("split", [(r["requests_per_s"], r["split_share"]) for r in curve])],
        ),
        chart("Time to first token", "ms", "share of requests", [("TTFT", distributions["ttft_ms"])]),
        chart(
            "Inter-token latency", "ms", "share of requests",
            [("mean of an answer", distributions["tpot_ms"]), ("its longest tenth", distributions["worst_gap_ms"])],
        ),
        chart(
            "Pools over time", "s", "share busy",
            [
                ("decode", [(s["at_s"], s["decode_busy"]) for s in samples]),
                ("prefill", [(s["at_s"], s["prefill_busy"]) for s in samples]),
                ("KV of decode", [(s["at_s"], s["kv_share"]) for s in samples]),
            ],
        ),
    ]  # fmt: skip
    assumptions = "".join(f"<li>{html.escape(a)}</li>" for a in data["assumptions"])
    rows = "".join(
        f"<tr><td>{r['requests_per_s']:.2f}</td>"
        + "".join(f"<td>{r['attainment'][m]:.1%}</td><td>{r['goodput_requests_per_s'][m]:.2f}</td>" for m in METRICS)
        + f"<td>{r['split_share']:.1%}</td><td>{r['cached_share']:.1%}</td>"
        + f"<td>{r['ttft_ms'].get('p50', 0):.0f} / {r['ttft_ms'].get('p99', 0):.0f}</td>"
        + f"<td>{r['tpot_ms'].get('p50', 0):.1f} / {r['tpot_ms'].get('p99', 0):.1f}</td></tr>"
        for r in curve
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Diptych: simulation</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1000px; color: #1f2937; padding: 0 1rem }}
figure {{ display: inline-block; margin: 0 1rem 1rem 0 }} figcaption {{ font-weight: 600 }}
table {{ border-collapse: collapse }} 
td, th {{ padding: .2rem .7rem; border-bottom: 1px solid #e5e7eb; text-align: right }}
</style></head><body><h1>{html.escape(data["trace"])}: {html.escape(data["policy"])}</h1>
<p>{html.escape(data["cluster"])}</p>
{"".join(charts)}
<table><tr><th>requests/s</th><th>met (mean gap)</th><th>goodput</th><th>met (longest tenth)</th><th>goodput</th>
<th>split</th><th>cached</th><th>TTFT p50 / p99 ms</th><th>gap p50 / p99 ms</th></tr>{rows}</table>
<h2>What this rests on</h2><ul>{assumptions}</ul></body></html>
"""


def chart(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """An SVG figure; empty lines are left out."""
    drawn = [(name, points) for name, points in lines if points]
    xs = [x for _, points in drawn for x, _ in points] or [0.0]
    ys = [y for _, points in drawn for _, y in points] or [0.0]
    low, high, top = min(xs), max(xs) or 1.0, max(ys) * 1.05 or 1.0
    span = high - low or 1.0

    def at(x: float, y: float) -> str:
        px = _LEFT + (x - low) / span * (_WIDTH - _LEFT - 10)
        return f"{px:.1f},{_HEIGHT - _BOTTOM - y / top * (_HEIGHT - _BOTTOM - 24):.1f}"

    parts = []
    for i in range(5):
        x, y = low + span * i / 4, top * i / 4
        px, py = at(x, 0).split(",")[0], at(low, y).split(",")[1]
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{py}" y2="{py}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{py}" text-anchor="end" dy="4">{y:.3g}</text>')
        parts.append(f'<text x="{px}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">{x:.3g}</text>')
    for i, (name, points) in enumerate(drawn):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join(at(x, y) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(f'<text x="{_LEFT + 8 + 140 * i}" y="14" fill="{colour}">{html.escape(name)}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>')
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" font-size="11" fill="#374151" role="img" '
        f'aria-label="{html.escape(title)}: {html.escape(y_label)}">{"".join(parts)}</svg></figure>'
    )
