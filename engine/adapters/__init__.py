"""LoRA adapters: many over one model, in one batch (docs/adapters.md).

format.py reads and refuses; layers.py computes; slots.py says, without torch, who has one of the few places to compute
with. A plan's items name slot and adapter, and the runner loads what a slot does not hold yet.
"""
