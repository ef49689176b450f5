"""The catalog as OpenTelemetry instruments of one process.

Counters and gauges are observed: a reader is asked when somebody scrapes or exports, and nothing is paid before that.
Histograms are recorded once per request or step, never per token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation

from settings.telemetry.catalog import BY_NAME, MAX_LABEL_SETS, Kind, Metric, Source, of_source

log = logging.getLogger(__name__)

Labels = Mapping[str, str]
Reader = Callable[[], Iterable[tuple[float, Labels]]]  # called on any thread


class Instruments:
    """Raises ValueError when `readers` are not exactly those that the catalog asks for: names cannot drift."""

    def __init__(self, meter: Meter, source: Source, readers: Mapping[str, Reader]) -> None:
        self._histograms: dict[str, Histogram] = {}
        observed = {m.name for m in of_source(source) if m.kind is not Kind.HISTOGRAM}
        if readers.keys() != observed:
            missing, unknown = sorted(observed - readers.keys()), sorted(readers.keys() - observed)
            raise ValueError(f"metrics of a {source}: without a reader {missing}, not in the catalog {unknown}")
        for metric in of_source(source):
            match metric.kind:
                case Kind.HISTOGRAM:
                    self._histograms[metric.name] = meter.create_histogram(
                        metric.name, metric.unit, metric.help, explicit_bucket_boundaries_advisory=metric.buckets
                    )
                case Kind.COUNTER:
                    callback = _callback(metric, readers[metric.name])
                    meter.create_observable_counter(metric.name, [callback], metric.unit, metric.help)
                case Kind.GAUGE:
                    callback = _callback(metric, readers[metric.name])
                    meter.create_observable_gauge(metric.name, [callback], metric.unit, metric.help)

    def record(self, name: str, value: float, labels: Labels | None = None) -> None:
        """One observation of a histogram."""
        assert labels is None or labels.keys() <= set(BY_NAME[name].labels), f"{name}: {labels}"
        self._histograms[name].record(value, labels)


def _callback(metric: Metric, read: Reader) -> Callable[[CallbackOptions], Iterable[Observation]]:
    told = False

    def observe(_: CallbackOptions) -> Iterable[Observation]:
        nonlocal told
        observations = []
        for value, labels in read():
            if labels.keys() - set(metric.labels):
                raise ValueError(f"{metric.name} has the labels {metric.labels}, not {sorted(labels)}")
            if len(observations) >= MAX_LABEL_SETS:
                if not told:
                    told = True
                    log.warning("%s has more than %d label sets; further ones are dropped", metric.name, MAX_LABEL_SETS)
                break
            observations.append(Observation(value, labels))
        return observations

    return observe


def plain(read: Callable[[], float]) -> Reader:
    """A reader of one value without labels."""
    return lambda: ((read(), {}),)


def by(label: str, read: Callable[[], Mapping[str, float]]) -> Reader:
    """A reader of values by one label. The mapping may be written by another thread meanwhile."""
    return lambda: [(value, {label: key}) for key, value in dict(read()).items()]
