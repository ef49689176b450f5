"""Owns a prefill replica: prompt in, first token out, KV blocks under lease for whoever decodes."""
