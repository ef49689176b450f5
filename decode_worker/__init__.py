"""Owns a decode replica: pulls KV from a prefill worker, or computes the prompt itself; streams tokens."""
