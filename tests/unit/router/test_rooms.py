"""The rooms of `router/`: its wings, and the files on the floor. Each imports rooms that stand above it here, so that
no two of them import each other. Walks the source; runs nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROUTER = Path(__file__).resolve().parents[3] / "router"

ROOMS = {
    "errors": set(),
    "config": set(),
    "retry": set(),
    "status": {"errors"},
    "placement": {"errors"},
    "breakdown": {"placement"},
    "text": {"errors"},
    "access": {"errors", "status"},
    "request": {"placement"},
    "beams": {"errors", "request"},
    "prompt_logprobs": set(),
    "effects": {"errors", "placement", "request"},
    "legs": {"breakdown", "errors", "placement"},
    "lifecycle": {"breakdown", "effects", "errors", "legs", "placement", "prompt_logprobs", "request"},
    "scored_life": {"errors", "legs", "lifecycle", "prompt_logprobs", "request"},
    "beam_life": {"lifecycle", "request", "scored_life"},
    "admission": {"access", "beams", "config", "errors", "placement", "request", "text"},
    "planner": {"errors", "placement", "request", "retry"},
    "sessions": {"placement", "request"},
    "wire": {"errors", "placement", "request"},
    "record": {"breakdown", "errors", "legs", "lifecycle", "placement", "request"},
    "live": {"access", "effects", "errors", "lifecycle", "placement", "record", "request"},
    "suspects": {"errors", "legs", "lifecycle", "live", "placement", "record"},
    "forks": {"beam_life", "legs", "lifecycle", "live", "placement", "planner", "record", "request"},
    "moves": {"legs", "lifecycle", "live", "placement", "record"},
    "dispatcher": {
        "access", "admission", "beam_life", "breakdown", "config", "errors", "forks", "legs", "lifecycle", "live",
        "moves", "placement", "planner", "record", "request", "retry", "sessions", "suspects", "text",
    },
    "clients": {"breakdown", "dispatcher", "errors", "placement", "request", "wire"},
    "operating": {"breakdown", "errors", "live", "moves", "placement", "record"},
    "doors": {
        "access", "admission", "beams", "breakdown", "clients", "config", "dispatcher", "errors", "lifecycle",
        "operating", "placement", "prompt_logprobs", "record", "request", "status", "text", "wire",
    },
    "server": {
        "access", "clients", "config", "dispatcher", "doors", "errors", "operating", "placement", "record", "text",
    },
    "__main__": {"config", "server"},
}  # fmt: skip
ON_THE_FLOOR = 25  # files; a new one belongs in a wing, unless a request's life cannot be read without it


def imported_rooms(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("router."):
                yield name.split(".")[1]


def files_of(room: str) -> list[Path]:
    wing = ROUTER / room
    return sorted(wing.rglob("*.py")) if wing.is_dir() else [ROUTER / f"{room}.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_may(room: str) -> None:
    for path in files_of(room):
        wrong = {name for name in imported_rooms(path) if name != room and name not in ROOMS[room]}
        assert not wrong, f"{path.relative_to(ROUTER)} imports router.{', router.'.join(sorted(wrong))}"


def test_every_room_stands_here_and_below_what_it_imports() -> None:
    there = {p.stem if p.is_file() else p.name for p in ROUTER.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert there - {"__init__", "__pycache__"} == set(ROOMS)
    above: set[str] = set()
    for room, may in ROOMS.items():
        assert may <= above, f"{room} may import {may - above}, which stands below it"
        above.add(room)


def test_the_floor_is_a_request_s_life() -> None:
    assert len([p for p in ROUTER.glob("*.py") if p.name != "__init__.py"]) <= ON_THE_FLOOR
