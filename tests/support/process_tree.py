"""Which processes a process has started, as the kernel's tables say."""

from __future__ import annotations

from pathlib import Path


def command_line(pid: int) -> str:
    """Empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def descendants(pid: int) -> dict[int, str]:
    """Command lines of a process's children, theirs, and so on."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    family = {pid}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    return {member: line for member in family - {pid} if (line := command_line(member))}
