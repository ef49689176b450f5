"""On which processors the kernels' threads run (engine.pin_threads)."""

from __future__ import annotations

from settings.processors import allowed


class ProcessorsError(Exception):
    """The processors wanted are not there; the message says which are."""


def numbers(wanted: str) -> tuple[int, ...]:
    """Those that "0,4-7" names; none for auto and off."""
    if wanted in ("auto", "off"):
        return ()
    named: list[int] = []
    for part in wanted.split(","):
        first, _, last = part.partition("-")
        named += range(int(first), int(last or first) + 1)
    return tuple(named)


def chosen(wanted: str, threads: int) -> tuple[int, ...]:
    """One processor for each thread; none: the operating system's choice. Raises ProcessorsError.

    `wanted`: "off"; "auto": where there are as many processors as threads, each has its own, and elsewhere a choice
    would be a guess about what else runs; or numbers, "0,4-7".
    """
    mine = list(allowed())
    if wanted == "off" or not mine:
        return ()
    if wanted == "auto":
        return tuple(mine) if len(mine) == threads > 1 else ()
    named = numbers(wanted)
    missing = sorted(set(named) - set(mine))
    if missing or len(named) != threads:
        why = f"processor {missing[0]} is not among those allowed, {mine}" if missing else f"{threads} threads run"
        raise ProcessorsError(
            f"engine.pin_threads names {len(named)} processors ({wanted}), and {why}; name one for each of "
            "engine.threads, or set it to auto"
        )
    return named
