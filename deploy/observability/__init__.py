"""Dashboards, alert rules and docs/metrics.md, from the one list of metrics: `python -m deploy.observability`."""
