"""What lies in a model's directory, read with suspicion: settings, weights' tables, tokenizer, identity.

A file that is missing, cut short or of another kind is a CheckpointError: one sentence with the file, the cause and
what to do. Nothing here imports torch or knows an engine or a router.
"""
