"""One decision in plain words, and as JSON. `explanation` is an Explanation (cluster.proto)."""

from __future__ import annotations

from typing import Any


def _ms(value: float) -> str:
    return f"{value / 1e3:.2f} s" if value >= 10_000 else f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def _where(decode: str, prefill: str) -> str:
    return f"split {prefill} → {decode}" if prefill else f"local {decode}"


def render(explanation: Any) -> str:
    request = explanation.request
    lines = [
        f"request {request.request_id}: {request.outcome}, prompt {request.prompt_tokens} tokens "
        f"({request.cached_tokens} cached), answer {request.completion_tokens} tokens"
        + (f", recovered {request.recoveries} times" if request.recoveries else "")
    ]
    if request.HasField("speculation"):
        s = request.speculation
        lines.append(
            f"speculation: {tokens_a_step(request):.2f} tokens a step; {s.verifications} verifications of {s.drafts} "
            f"drafts, {s.accepted} accepted"
        )
    if request.route.mixed_weights:
        lines.append(
            f"its weights: {', then '.join(_scheme(w) for w in request.route.mixed_weights)}: by "
            "router.mixed_quantization; the answer is not token-identical to that of any one engine"
        )
    for number, decision in enumerate(explanation.decisions):
        lines.append("")
        lines += _decision(decision, "placed" if number == 0 else "then")
    if explanation.migrations:
        lines.append("")
        lines += _moves(explanation.migrations)
    lines.append("")
    lines += _happened(explanation)
    return "\n".join(lines)


def tokens_a_step(request: Any) -> float:
    """A step gives a token, and one more for each accepted draft."""
    tokens = request.completion_tokens
    return tokens / max(1, tokens - request.speculation.accepted)


def _scheme(weights: str) -> str:
    return {"none": "not quantized", "unknown": "unknown before it was resumed"}.get(weights, weights)


def _moves(migrations: Any) -> list[str]:
    lines = ["moved while it ran"]
    for m in migrations:
        line = f"  {m.source_worker} → {m.target_worker}   because {m.reason}: {m.outcome}"
        if m.took_ms:
            line += f" after {_ms(m.took_ms)}, {m.pulled_bytes / 1e6:.1f} MB pulled"
        if m.HasField("pause_ms"):
            line += f"; the stream paused for {_ms(m.pause_ms)}"
        lines.append(line)
    return lines


def _decision(decision: Any, verb: str) -> list[str]:
    route = decision.route
    e = {x.name: x.value for x in route.estimates}
    lines = [f"{verb}  {_where(route.decode_worker, route.prefill_worker)}   because {route.rule}"]
    if "local_ttft_ms" in e:
        stall = f", stalls its decodes by {_ms(e['local_stall_ms'])}" if e["local_stall_ms"] >= 1 else ""
        stall += _delays(e.get("local_delays_ms", 0.0))
        lines.append(
            f"  local   cost {_ms(e['local_cost_ms'])}: first token in {_ms(e['local_ttft_ms'])} = "
            f"{_ms(e['local_backlog_ms'])} backlog + {_ms(e['local_prefill_ms'])} for "
            f"{e['uncached_on_decode_tokens']:.0f} tokens{stall}"
        )
    if "split_ttft_ms" in e:
        lines.append(
            f"  split   cost {_ms(e['split_cost_ms'])}: first token in {_ms(e['split_ttft_ms'])} = "
            f"{_ms(e['split_backlog_ms'])} backlog + {_ms(e['split_prefill_ms'])} for "
            f"{e['uncached_on_prefill_tokens']:.0f} tokens; handing over {_ms(e['handoff_ms'])} "
            f"({e['transfer_bytes'] / 1e6:.1f} MB in {_ms(e['transfer_ms'])}, most of it early)"
            + _delays(e.get("split_delays_ms", 0.0))
        )
    if "itl_ms" in e:
        lines.append(f"  then    {_ms(e['itl_ms'])} a token on {route.decode_worker}")
    if decision.prefix_holder:
        lines.append(
            f"  prefix  {decision.prefix_tokens} tokens pulled from {decision.prefix_holder} in {_ms(e['pull_ms'])}"
        )
    if decision.alternatives:
        lines.append(f"  weighed against (this: {_ms(decision.cost_ms)})")
        for a in decision.alternatives:
            where = _where(a.decode_worker, a.prefill_worker)
            lines.append(f"    {_ms(a.cost_ms):>9}  {where}, first token in {_ms(a.ttft_ms)}")
    return lines


def _delays(ms: float) -> str:
    return f", delays later requests by {_ms(ms)}" if ms >= 1 else ""


def _happened(explanation: Any) -> list[str]:
    lines = ["what happened"]
    for p in explanation.predictions:
        error = (p.predicted_ms - p.actual_ms) / p.actual_ms if p.actual_ms > 0 else 0.0
        name = p.name.removesuffix("_ms")
        lines.append(f"  {name:8}{_ms(p.actual_ms):>10}   predicted {_ms(p.predicted_ms)} ({error:+.0%})")
    if not explanation.predictions:
        moved = explanation.request.recoveries > 0 or len(explanation.migrations) > 0
        lines.append("  it was moved, so the estimates do not apply" if moved else "  no token yet")
    t = explanation.request.timings
    if t.total_ms:
        lines.append(f"  {'total':8}{_ms(t.total_ms):>10}")
    return lines


def to_dict(explanation: Any) -> dict[str, Any]:
    request = explanation.request
    return {
        "request_id": request.request_id,
        "outcome": request.outcome,
        "prompt_tokens": request.prompt_tokens,
        "cached_tokens": request.cached_tokens,
        "completion_tokens": request.completion_tokens,
        "recoveries": request.recoveries,
        "speculation": {
            "tokens_a_step": tokens_a_step(request),
            "verifications": request.speculation.verifications,
            "drafts": request.speculation.drafts,
            "accepted": request.speculation.accepted,
        }
        if request.HasField("speculation")
        else None,
        "mixed_weights": list(request.route.mixed_weights),
        "age_ms": request.age_ms,
        "timings": {f.name: v for f, v in request.timings.ListFields()},
        "decisions": [
            {
                "placement": "split" if d.route.prefill_worker else "local",
                "decode_worker": d.route.decode_worker,
                "prefill_worker": d.route.prefill_worker,
                "rule": d.route.rule,
                "cost_ms": d.cost_ms,
                "estimates": {e.name: e.value for e in d.route.estimates},
                "prefix_holder": d.prefix_holder,
                "prefix_tokens": d.prefix_tokens,
                "alternatives": [
                    {
                        "placement": "split" if a.prefill_worker else "local",
                        "decode_worker": a.decode_worker,
                        "prefill_worker": a.prefill_worker,
                        "ttft_ms": a.ttft_ms,
                        "cost_ms": a.cost_ms,
                    }
                    for a in d.alternatives
                ],
            }
            for d in explanation.decisions
        ],
        "migrations": [
            {
                "source": m.source_worker,
                "target": m.target_worker,
                "reason": m.reason,
                "outcome": m.outcome,
                "pause_ms": m.pause_ms if m.HasField("pause_ms") else None,
                "pulled_bytes": m.pulled_bytes,
                "took_ms": m.took_ms,
            }
            for m in explanation.migrations
        ],
        "predictions": {
            p.name: {"predicted_ms": p.predicted_ms, "actual_ms": p.actual_ms} for p in explanation.predictions
        },
    }
