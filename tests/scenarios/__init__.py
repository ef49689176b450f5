"""A whole cluster in one thread and virtual time, under seeded faults."""
