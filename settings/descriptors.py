"""File descriptors: as many as the process may have, and never more connections than leave room for the rest.

A process that has none left accepts nobody, opens no file and cannot say why. So each of its ports gets a bound that
holds whatever `ulimit -n` is.
"""

from __future__ import annotations

import errno
import logging
import resource
from collections.abc import Mapping

log = logging.getLogger(__name__)

OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_ENOUGH = 1 << 20
_RESERVE = 96  # libraries, logs, model files, and what the process itself dials
_RESERVED_SHARE = 0.1
_LEAST = 4  # of every port, whatever the limit


def raise_limit() -> int:
    """The soft limit becomes the hard one, which needs nobody's leave. Returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:  # macOS: the hard limit is not all of it
            log.warning("the limit of open files stays at %d: %s", soft, error)
            return soft
        return wanted
    return _ENOUGH if soft == resource.RLIM_INFINITY else soft


def shared_out(wanted: Mapping[str, int], limit: int) -> dict[str, int]:
    """Connections by settings key: as wanted, or all in proportion where the limit is lower."""
    usable = max(0, int(limit * (1 - _RESERVED_SHARE)) - _RESERVE)
    total = sum(wanted.values())
    if total <= usable:
        return dict(wanted)
    return {key: max(min(_LEAST, n), n * usable // total) for key, n in wanted.items()}


def bounded_connections(wanted: Mapping[str, int]) -> dict[str, int]:
    """`shared_out` for this process, and a word about it in the log where it is less than wanted."""
    limit = raise_limit()
    given = shared_out(wanted, limit)
    if given != wanted:
        log.warning(
            "this process may open %d files: connections are bounded to %s; for more raise `ulimit -n` (a hard limit)",
            limit,
            ", ".join(f"{n} ({key}: {wanted[key]})" for key, n in given.items()),
        )
    return given
