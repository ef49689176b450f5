"""The image, built from its Dockerfile without a container engine, and programs run in it as Kubernetes would.

    Debian packages --mmdebstrap--> a base with Python --buildah, chroot isolation--> the image --mount--> its files

What runs there is the image's user, without a capability, on a root that cannot be written, without any network but its
own loopback. $DIPTYCH_TEST_IMAGE_BASE names another base: an image of a registry, or an archive of files. pip in the
build uses what pip uses here: its settings, and the directories that these name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
_PYTHON = "python3,python3-venv,ca-certificates"
_SUITE = "bookworm"  # its Python is the image's
_LONG_S = 3000.0
_PIP = (sys.executable, "-m", "pip")
# /tmp and /dev/shm can be written: the chart mounts them too.
_ENTER = """
set -e
root=$1 user=$2 command=$3; shift 3
mount --make-rprivate /
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t tmpfs tmpfs "$root/tmp"
ip link set lo up
exec env -i "$@" chroot "$root" setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs \\
    --inh-caps=-all --bounding-set=-all sh -c "$command"
"""


class Image:
    def __init__(self, home: Path) -> None:
        if not os.environ.get("DIPTYCH_TEST_IMAGE"):
            pytest.skip("make test-image builds the image: it takes long, and loads much")
        for tool, package in (("buildah", "buildah"), ("mmdebstrap", "mmdebstrap"), ("ip", "iproute2")):
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed (Debian package {package})")
        if os.geteuid() != 0:
            pytest.skip("only root may build with chroot isolation, and enter an image as another user")
        self._home = home
        self.variant = os.environ.get("DIPTYCH_TEST_IMAGE_VARIANT", "cpu")
        self.config: dict[str, Any] = {}
        self.files = Path()

    def build(self) -> None:
        base = os.environ.get("DIPTYCH_TEST_IMAGE_BASE", "")
        if not base or os.path.isfile(base):
            base = self._imported(base or self._debian())
        index = self._index() if self.variant == "cpu" else []
        mounts = [word for mount in [*index, *self._pip()] for word in ("--volume", f"{mount}:ro")]
        settings = [f"BASE={base}", f"VARIANT={self.variant}", *(["TORCH_INDEX=file:///torch-index"] if index else [])]
        told = [word for setting in settings for word in ("--build-arg", setting)]
        self._buildah(
            "build", "--isolation", "chroot", *told, *mounts, "--file", str(DOCKERFILE), "--tag", "diptych", str(ROOT)
        )
        self.config = json.loads(self._buildah("inspect", "--type", "image", "diptych"))["OCIv1"]["config"]
        self.files = Path(self._buildah("mount", self._buildah("from", "diptych")))

    def run(self, command: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """A line for the image's shell."""
        user, place = self.config["User"], self.config["WorkingDir"]
        apart = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
        given = [str(self.files), user, f"cd {place}; {command}", *self.config["Env"], "HOME=/home/ray"]
        return subprocess.run(
            [*apart, "sh", "-c", _ENTER, "sh", *given], capture_output=True, text=True, check=False, timeout=timeout_s
        )

    def close(self) -> None:
        """Mounts do not outlive the test."""
        for words in (("umount", "--all"), ("rm", "--all"), ("rmi", "--all", "--force")):
            subprocess.run([*self._command(), *words], capture_output=True, check=False, timeout=_LONG_S)

    def _command(self) -> list[str]:
        return ["buildah", "--root", str(self._home / "store"), "--runroot", str(self._home / "run")]

    def _buildah(self, *words: str) -> str:
        done = subprocess.run([*self._command(), *words], capture_output=True, text=True, check=False, timeout=_LONG_S)
        assert done.returncode == 0, f"buildah {' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout.strip()

    def _debian(self) -> str:
        """Debian with its Python: there is no other way to it without a registry of images."""
        archive = self._home / "base.tar"
        made = subprocess.run(
            ["mmdebstrap", "--variant=minbase", f"--include={_PYTHON}", _SUITE, str(archive)],
            capture_output=True, text=True, check=False, timeout=_LONG_S,
        )  # fmt: skip
        if made.returncode != 0:
            pytest.skip(f"no base: mmdebstrap ended with {made.stderr.strip().splitlines()[-1:]}")
        return str(archive)

    def _imported(self, archive: str) -> str:
        container = self._buildah("from", "scratch")
        self._buildah("add", container, archive, "/")
        self._buildah("commit", "--quiet", container, "localhost/base")
        self._buildah("rm", container)
        return "localhost/base"

    def _index(self) -> list[str]:
        """Torch's CPU build in an index of its own, where pip here can find one; else the Dockerfile's."""
        index = self._home / "torch-index"
        if not index.exists():
            lock = (ROOT / "requirements/lock.txt").read_text()
            wanted = next(line for line in lock.splitlines() if line.startswith("torch=="))
            place = index / "torch"
            place.mkdir(parents=True)
            (self._home / "torch.txt").write_text(f"{wanted}\n")
            subprocess.run(
                [*_PIP, "download", "-q", "--no-deps", "--require-hashes", "-d", str(place), "-r",
                 str(self._home / "torch.txt")],
                capture_output=True, check=False, timeout=_LONG_S,
            )  # fmt: skip
            links = "".join(f'<a href="{wheel.name}">{wheel.name}</a>' for wheel in place.glob("*.whl"))
            (place / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")
        return [f"{index}:/torch-index"] if list(index.glob("torch/*.whl")) else []

    def _pip(self) -> list[str]:
        told = subprocess.run([*_PIP, "config", "list"], capture_output=True, text=True, check=True, timeout=60).stdout
        settings = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", told, re.MULTILINE))
        settings.pop("constraint", None)
        config = self._home / "pip.conf"
        config.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        places = {
            os.path.dirname(path.rstrip("/")) if "index" in name else path  # its pages link to files beside it
            for name, value in settings.items()
            for path in (word.removeprefix("file://") for word in value.split())
            if os.path.isabs(path)
        }
        return [f"{config}:/etc/pip.conf", *(f"{path}:{path}" for path in sorted(places))]
