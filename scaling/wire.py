"""Reports of decisions as ScalingDecision messages."""

from __future__ import annotations

from diptych.v1 import scaling_pb2

from scaling.report import Counts, Report


def _counts(counts: Counts) -> scaling_pb2.ScalingCounts:
    return scaling_pb2.ScalingCounts(prefill=counts.prefill, decode=counts.decode, standby=counts.standby)


def report_to_wire(report: Report, now: float) -> scaling_pb2.ScalingDecision:
    """`now`: on the clock of the decision."""
    d = report.decision
    return scaling_pb2.ScalingDecision(
        decider=report.decider,
        number=report.number,
        age_ms=max(0.0, now - d.at) * 1e3,
        interval_s=report.interval_s,
        before=_counts(report.before),
        after=_counts(Counts(d.prefill, d.decode, d.standbys)),
        ready=_counts(report.ready),
        rule=d.rule,
        reason=d.why,
        shifted=d.shifted,
        woken=d.woken,
        started=d.started,
        stopped=d.stopped,
        withdrawn=d.withdrawn,
        outcome=_outcome(report),
        error=report.error,
        numbers=d.numbers,
        alternatives=[
            scaling_pb2.ScalingAlternative(
                prefill=a.prefill,
                decode=a.decode,
                prefill_strain=a.prefill_strain,
                decode_strain=a.decode_strain,
                what=a.what,
                takes_s=a.takes_s,
                verdict=a.verdict,
            )
            for a in d.alternatives
        ],
    )


def _outcome(report: Report) -> scaling_pb2.ScalingOutcome:
    if report.error:
        return scaling_pb2.SCALING_OUTCOME_FAILED
    if report.decision.dry_run:
        return scaling_pb2.SCALING_OUTCOME_DRY_RUN
    if report.decision.changes or report.before != _asked_after(report):
        return scaling_pb2.SCALING_OUTCOME_APPLIED
    return scaling_pb2.SCALING_OUTCOME_UNCHANGED


def _asked_after(report: Report) -> Counts:
    d = report.decision
    return Counts(d.prefill, d.decode, d.standbys)
