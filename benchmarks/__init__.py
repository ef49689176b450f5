"""Every figure we quote, as a script: `python -m benchmarks.NAME`. Results are dated files in `benchmarks/results/`."""
