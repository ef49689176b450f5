"""Kernels for CPU, compiled on the machine that runs them: packed products, paged attention, a whole decoder stack."""
