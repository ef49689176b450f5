"""Memory that a loaded model no longer needs goes back, and nothing that it needs."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from engine.given_back import clean_mappings, give_back

SIZE = 4 << 20


def resident_kb(path: Path) -> int:
    lines, found, inside = Path("/proc/self/smaps").read_text().splitlines(), 0, False
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):
            inside = words[-1] == str(path)
        elif inside and words[0] == "Rss:":
            found += int(words[1])
    return found


def mapped(path: Path) -> mmap.mmap:
    """Privately, as weights are; every page looked at."""
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file:
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    assert sum(found[::4096]) == 0
    assert resident_kb(path) == SIZE >> 10
    return found


def test_pages_of_weights_go_back_and_come_again(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with mapped(path) as weights:
        give_back()
        assert resident_kb(path) < SIZE >> 11
        assert weights[:] == path.read_bytes()


def test_what_was_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with mapped(path) as weights:
        weights[8192] = 77
        give_back()
        assert weights[8192] == 77
        assert resident_kb(path) >= SIZE >> 11, "the kernel itself lets go of a huge page that is written to"


def test_other_files_stay(tmp_path: Path) -> None:
    path = tmp_path / "other.bin"
    with mapped(path):
        give_back()
        assert resident_kb(path) == SIZE >> 10


@pytest.mark.parametrize("text", ["", "00400000-00452000 r-xp 0 08:02 1\nRss: 4 kB\nAnonymous: 0 kB\n"])
def test_a_process_without_weights(text: str) -> None:
    assert not list(clean_mappings(text))
