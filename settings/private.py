"""Files that nobody but their owner may read."""

from __future__ import annotations

import logging
import os
import stat

log = logging.getLogger(__name__)


def readable_by_others(path: str | os.PathLike[str]) -> str:
    """Empty if only owner and group may read the file and only its owner may write it; else what is wrong, and the fix.

    A group may read: that is how secrets of Kubernetes reach a process that is not root.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return ""  # whoever reads it says what is wrong
    if not mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        return ""
    return f"{path}: others may read or write it (mode {stat.S_IMODE(mode):04o}); run `chmod 600 {path}`"


def warn_of_readers(path: str, key: str) -> None:
    """Of a secret that is used all the same: in a container nobody else may be there to read it."""
    if problem := readable_by_others(path):
        log.warning("%s: %s", key, problem)
