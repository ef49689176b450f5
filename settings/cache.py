"""Where things are kept that can be made again: compiled kernels, the embedded model, digests.

$DIPTYCH_HOME, else a directory of the user's cache. Where that cannot be written (a read-only home, a container's user
without one) what is compiled goes to a private directory beside the temporary files, and is made again after a reboot.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """It need not exist."""
    home = os.environ.get("DIPTYCH_HOME")
    if home:
        return Path(home)
    above = os.environ.get("XDG_CACHE_HOME")
    if above:
        return Path(above) / "diptych"
    try:
        return Path.home() / ".cache" / "diptych"
    except RuntimeError:  # neither $HOME nor an entry for this user
        return _private()


def writable_cache(name: str) -> Path:
    """A directory below it, made if need be. Raises OSError where there is no place at all."""
    wanted = cache_directory() / name
    try:
        _check_writable(wanted)
        return wanted
    except OSError as error:
        instead = _private() / name
        _check_writable(instead)
        log.warning(
            "%s cannot be written (%s): %s takes its place; set DIPTYCH_HOME to a directory that can",
            wanted,
            error.strerror,
            instead,
        )
        return instead


def _check_writable(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def _private() -> Path:
    """Code is loaded from here: nobody else may have put it there. Raises OSError."""
    directory = Path(tempfile.gettempdir()) / f"diptych-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(1, "is not this user's alone", str(directory))
    return directory
