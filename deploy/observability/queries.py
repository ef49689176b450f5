"""PromQL from the catalog's names: a name that is not in it does not get this far."""

from __future__ import annotations

from settings.telemetry.catalog import BY_NAME, Kind

WINDOW = "5m"


def gauge(name: str, **matchers: str) -> str:
    assert BY_NAME[name].kind is Kind.GAUGE, name
    return _select(BY_NAME[name].prometheus_name, matchers)


def rate(name: str, window: str = WINDOW, **matchers: str) -> str:
    """Of a counter, per second."""
    assert BY_NAME[name].kind is Kind.COUNTER, name
    return f"rate({_select(BY_NAME[name].prometheus_name, matchers)}[{window}])"


def increase(name: str, window: str = WINDOW, **matchers: str) -> str:
    """Of a counter, within the window."""
    assert BY_NAME[name].kind is Kind.COUNTER, name
    return f"increase({_select(BY_NAME[name].prometheus_name, matchers)}[{window}])"


def quantile(q: float, name: str, *by: str, window: str = WINDOW, **matchers: str) -> str:
    assert BY_NAME[name].kind is Kind.HISTOGRAM, name
    buckets = _select(f"{BY_NAME[name].prometheus_name}_bucket", matchers)
    return f"histogram_quantile({q}, sum by ({', '.join(('le', *by))}) (rate({buckets}[{window}])))"


def count_rate(name: str, window: str = WINDOW, **matchers: str) -> str:
    """Observations of a histogram, per second."""
    assert BY_NAME[name].kind is Kind.HISTOGRAM, name
    return f"rate({_select(f'{BY_NAME[name].prometheus_name}_count', matchers)}[{window}])"


def sum_rate(name: str, window: str = WINDOW, **matchers: str) -> str:
    """What a histogram observed, per second."""
    assert BY_NAME[name].kind is Kind.HISTOGRAM, name
    return f"rate({_select(f'{BY_NAME[name].prometheus_name}_sum', matchers)}[{window}])"


def _select(series: str, matchers: dict[str, str]) -> str:
    """A value that begins with ! or ~ is matched by !=, =~."""
    parts = []
    for label, value in matchers.items():
        operator = {"!": "!=", "~": "=~"}.get(value[:1], "=")
        parts.append(f'{label}{operator}"{value if operator == "=" else value[1:]}"')
    return f"{series}{{{','.join(parts)}}}" if parts else series
