"""What is kept and told of requests: history, counts, metrics, traces."""
