"""A model over several processes: docs/parallelism.md."""
