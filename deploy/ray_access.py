"""Who may use the Ray cluster under ours. Whoever reaches Ray's ports can run code, so a stranger must not.

A cluster that is started here: every part of Ray listens on loopback, and asks for a token even there, because a
machine has other users. Its files are below a directory that only its owner may enter: Ray makes its own directories
writable for everybody. One that is joined: with its token, unless `ray.authentication` says that it has none.

Ray reads these variables when it is imported: set them before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

from deploy.config import RayConfig
from settings.addresses import join
from settings.listeners import declare
from settings.private import readable_by_others

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_MAX_DIRECTORY_CHARS = 40  # Ray's sockets have long names, and a socket's path may have 107 characters
_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
# Off: Ray takes this machine for one that joins no others, and its address for loopback. (Its name tells of the
# systems where that is the default; `_node_ip_address` alone is resolved away from loopback.)
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class RayAccessError(Exception):
    """Names cause and fix."""


def for_local(config: RayConfig) -> dict[str, Any]:
    """Puts the environment right and returns what `ray.init` is to be told. Raises RayAccessError."""
    os.environ[_MODE] = "token"
    os.environ[_CLUSTERS] = "0"
    if not _given_token(config):
        os.environ[_TOKEN] = secrets.token_hex(32)
    _tell_ray()
    return {
        "address": "local",  # whatever RAY_ADDRESS says
        "include_dashboard": False,
        "_node_ip_address": LOOPBACK,
        "_temp_dir": str(private_directory() / "ray"),
    }


def for_joining(config: RayConfig) -> dict[str, Any]:
    """The same for a cluster that somebody else started."""
    os.environ.pop(_CLUSTERS, None)
    if config.authentication == "none":
        os.environ[_MODE] = "disabled"
    else:
        os.environ[_MODE] = "token"
        if not _given_token(config) and not (Path.home() / ".ray" / "auth_token").exists():
            raise RayAccessError(
                f"there is no token for the Ray cluster at {config.address}: set ray.token_file (or "
                f"{_TOKEN_PATH}), or ray.authentication: none if that cluster requires none"
            )
    _tell_ray()
    return {"address": config.address}


def _given_token(config: RayConfig) -> bool:
    """Whether the settings or the environment name one. Raises RayAccessError for a file that is no good."""
    if not config.token_file and os.environ.get(_TOKEN):
        return True
    path = config.token_file or os.environ.get(_TOKEN_PATH, "")
    if not path:
        return False
    key = "ray.token_file" if config.token_file else _TOKEN_PATH
    try:
        found = Path(path).read_text().strip()
    except (OSError, ValueError) as error:
        raise RayAccessError(f"{key} {path}: cannot be read: {error}; make one with `ray get-auth-token`") from None
    if not found:
        raise RayAccessError(f"{key} {path}: is empty; make one with `ray get-auth-token --generate`")
    problem = readable_by_others(path)
    if problem:
        raise RayAccessError(f"{key} {problem}")
    os.environ.pop(_TOKEN, None)  # which Ray would take instead
    os.environ[_TOKEN_PATH] = path
    return True


def _tell_ray() -> None:
    """Where it has been imported already, in tests for one."""
    if "ray" not in sys.modules:
        return
    import ray._raylet
    from ray._private import ray_constants

    compiled: Any = ray._raylet
    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(_CLUSTERS) != "0"
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()


def shown_to_ray() -> str:
    """What Ray's ports ask for in this process, in words."""
    return "Ray's token" if os.environ.get(_MODE) == "token" else "none"


def keep_serve_on_loopback() -> None:
    """For a replica, before Serve opens its port for calls between deployments: on every interface, whatever address
    the node has, and it unpickles what comes. Nothing of ours calls it.
    """
    import ray.serve._private.replica

    replica: Any = ray.serve._private.replica
    add_port = getattr(replica, "add_port_to_grpc_server", None)
    if add_port is None:
        log.error("Ray Serve is of an unknown version: its replicas may listen on every interface")
        return

    def on_loopback(server: Any, _: str) -> int:
        port = add_port(server, join(LOOPBACK, 0))
        declare(port, "Ray Serve", shown_to_ray(), encrypted=False)
        return port

    replica.add_port_to_grpc_server = on_loopback


def private_directory() -> Path:
    """Of this user, for all of Ray's files; nobody else may enter. Raises RayAccessError."""
    parent = os.environ.get("DIPTYCH_RAY_TMP") or tempfile.gettempdir()
    if len(parent) > _MAX_DIRECTORY_CHARS:
        parent = "/tmp"
    directory = Path(parent) / f"diptych-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            raise
        except OSError as error:
            raise RayAccessError(f"{directory}: {error.strerror}; set DIPTYCH_RAY_TMP to another directory") from None
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RayAccessError(
            f"{directory} is not a directory owned by this user. Remove it, or set DIPTYCH_RAY_TMP to another directory"
        )
    if found.st_mode & 0o077:
        directory.chmod(0o700)
    return directory
