"""What names of adapters stand for, as workers and operators say it. Of two words on a name the one with the larger
stamp counts; those that came with a worker's settings have none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_NAME, MOST_PATH, MOST_GROUPS = 256, 4096, 64


@dataclass(frozen=True, slots=True)
class AdapterWord:
    """Without a digest: the name stands for nothing any more. `groups`: of workers that are to have it; none: all."""

    name: str
    digest: str
    directory: str
    stamp: int = 0
    groups: tuple[str, ...] = ()

    def is_for(self, group: str) -> bool:
        return not self.groups or group in self.groups


@dataclass(frozen=True, slots=True)
class AdaptersSaid:
    """Of one worker; fields as AdaptersSaid in worker.proto."""

    adapters: tuple[AdapterWord, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()  # names and digests: for answers that began on them
    gone: tuple[tuple[str, int], ...] = ()  # names and stamps
    changes: int = 0
    takes_more: bool = False
    _words: dict[str, AdapterWord] = field(init=False, repr=False, compare=False)
    _stamps: dict[str, int] = field(init=False, repr=False, compare=False)  # it is asked for each, by every look

    def __post_init__(self) -> None:
        words = {word.name: word for word in reversed(self.adapters)}
        stamps = dict(self.gone)
        for name, stamp in (*self.gone, *((word.name, word.stamp) for word in self.adapters)):
            stamps[name] = max(stamp, stamps.get(name, stamp))
        object.__setattr__(self, "_words", words)
        object.__setattr__(self, "_stamps", stamps)

    def has(self, digest: str) -> bool:
        return any(word.digest == digest for word in self.adapters) or any(digest == own for _, own in self.kept)

    def stamp_of(self, name: str) -> int:
        """-1: it has never heard of the name."""
        return self._stamps.get(name, -1)

    def word(self, name: str) -> AdapterWord | None:
        return self._words.get(name)


def said_at_start(*adapters: tuple[str, str]) -> AdaptersSaid:
    """Of names and digests that came with the settings."""
    return AdaptersSaid(tuple(AdapterWord(name, digest, "") for name, digest in adapters))
