"""Threads with deep stacks, for libraries that recurse over what a client sent.

llguidance 1.9.1 follows references between rules, terminals and schemas by recursion: a chain of a thousand or three
overflows a stack of 8 MB, and the process is gone. Within MAX_STRUCTURED_BYTES no chain was found that needs more than
a tenth of this one. Only pages that are touched are memory.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

STACK_BYTES = 512 << 20


def deep_threads(count: int, name: str) -> ThreadPoolExecutor:
    """An executor whose threads exist from the start: the stack's size is a setting of the whole process."""
    executor = ThreadPoolExecutor(max_workers=count, thread_name_prefix=name)
    together = threading.Barrier(count + 1)
    before = threading.stack_size(STACK_BYTES)
    try:
        for _ in range(count):  # each waits for the others, so that none takes two of these
            executor.submit(together.wait, 10.0)
        together.wait(10.0)
    finally:
        threading.stack_size(before)
    return executor
