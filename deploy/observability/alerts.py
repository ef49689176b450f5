"""Alert rules as values. Each has a heading of its name in docs/runbooks.md. Thresholds are starting points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deploy.observability.queries import gauge, increase, quantile, rate


@dataclass(frozen=True, slots=True)
class Alert:
    """`severity`: page (somebody gets up) or ticket (tomorrow)."""

    name: str
    expr: str
    wait: str
    severity: str
    summary: str


_REQUESTS = f"sum({rate('diptych.requests')})"

ALERTS = (
    Alert(
        "DiptychNotServing",
        f"max({gauge('diptych.serving')}) == 0",
        "30s",
        "page",
        "No router would answer a request.",
    ),
    Alert("DiptychTargetDown", 'up{job="diptych"} == 0', "1m", "ticket", "A process cannot be scraped."),
    Alert(
        "DiptychErrors",
        f"sum({rate('diptych.errors', stage='failed')}) / {_REQUESTS} > 0.02",
        "2m",
        "page",
        "More than 2 % of the accepted requests fail.",
    ),
    Alert(
        "DiptychRefusing",
        f"sum({rate('diptych.errors', stage='refused', error_type='~RESOURCE_EXHAUSTED|UNAVAILABLE')}) > "
        f"0.05 * ({_REQUESTS} + 0.01)",
        "5m",
        "ticket",
        "Requests are refused because there is no room or no worker.",
    ),
    Alert(
        "DiptychFirstTokenSlow",
        f"{quantile(0.95, 'gen_ai.server.time_to_first_token')} > 5",
        "5m",
        "page",
        "One request in twenty waits more than 5 s for its first token.",
    ),
    Alert(
        "DiptychTokensSlow",
        f"{quantile(0.95, 'gen_ai.server.time_per_output_token')} > 0.2",
        "5m",
        "ticket",
        "One answer in twenty is slower than 200 ms per token.",
    ),
    Alert(
        "DiptychHandoffGapSlow",
        f"{quantile(0.95, 'diptych.handoff.gap')} > 0.5",
        "5m",
        "ticket",
        "One split request in twenty stalls more than 0.5 s after its first token.",
    ),
    Alert(
        "DiptychHandoffsFailing",
        f"sum({rate('diptych.handoffs', outcome='!adopted')}) / sum({rate('diptych.handoffs')}) > 0.05",
        "2m",
        "page",
        "More than 5 % of the handoffs fail; their requests are computed again.",
    ),
    Alert(
        "DiptychLeasesExpire",
        f"sum({rate('diptych.leases', outcome='expired')}) > 0",
        "2m",
        "ticket",
        "KV was kept for readers that never came.",
    ),
    Alert(
        "DiptychPathBroken",
        f"sum by (instance) ({gauge('diptych.paths', state='broken')}) > 0",
        "1m",
        "page",
        "KV of a prefill worker does not reach a decode worker.",
    ),
    Alert(
        "DiptychWorkersLost",
        f"max by (role) ({gauge('diptych.workers', state='lost')}) > 0",
        "1m",
        "ticket",
        "A router has lost workers that do not come back.",
    ),
    Alert(
        "DiptychNoPrefillWorker",
        f"max({gauge('diptych.workers', role='prefill', state='ready')}) == 0 and "
        f"max({gauge('diptych.workers', role='decode', state='ready')}) > 0",
        "2m",
        "ticket",
        "Everything runs on the decode pool. Silence this if you want no prefill pool.",
    ),
    Alert(
        "DiptychWorkerSuspect",
        f"max by (instance, part) ({gauge('diptych.watchdog.health')}) >= 1",
        "0s",
        "ticket",
        "A watchdog thinks that its worker may be stuck; at the limit the worker ends by itself.",
    ),
    Alert(
        "DiptychKvFull",
        f"sum by (instance) ({gauge('diptych.kv.blocks', state='free')}) / "
        f"sum by (instance) ({gauge('diptych.kv.blocks', state='total')}) < 0.03",
        "5m",
        "ticket",
        "A worker has less than 3 % of its KV blocks free.",
    ),
    Alert(
        "DiptychPreempting",
        f"sum by (instance) ({rate('diptych.preemptions')}) > 0.5",
        "5m",
        "ticket",
        "Sequences are preempted: they give up their blocks and are computed again.",
    ),
    Alert(
        "DiptychRecovering",
        f"sum({rate('diptych.recoveries')}) / {_REQUESTS} > 0.05",
        "2m",
        "ticket",
        "More than 5 % of the requests had to be moved or repaired.",
    ),
    Alert(
        "DiptychMigrationsStay",
        f"sum({rate('diptych.migrations', outcome='stayed')}) > 0.5 * (sum({rate('diptych.migrations')}) + 0.01)",
        "5m",
        "ticket",
        "Answers that should go on elsewhere mostly stay: a worker that leaves or switches is not emptied.",
    ),
    Alert(
        "DiptychRolesSwing",
        f"sum({rate('diptych.role.switches')}) > 0.05",
        "15m",
        "ticket",
        "Workers change their role more than three times a minute: whoever switches them goes back and forth.",
    ),
    Alert(
        "DiptychScalingSilent",
        f"min({gauge('diptych.scaling.age', mode='applied')}) > "
        f"30 + 4 * max({gauge('diptych.scaling.interval', mode='applied')})",
        "1m",
        "page",
        "Nobody decides any more how many workers there are: the pools stay as they are, whatever comes.",
    ),
    Alert(
        "DiptychScalingFails",
        f"max({increase('diptych.scaling.errors', '10m')}) > 1",
        "1m",
        "ticket",
        "The platform refuses what the scaling policy decides.",
    ),
    Alert(
        "DiptychCertificateEnds",
        f"min by (instance, listener) ({gauge('diptych.certificate.expiry')}) - time() < 7 * 86400",
        "1h",
        "ticket",
        "A certificate expires within a week; after that nobody can connect.",
    ),
)


def as_yaml_value() -> dict[str, Any]:
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.wait,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "runbook": f"docs/runbooks.md#{alert.name.lower()}"},
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "diptych", "rules": rules}]}
