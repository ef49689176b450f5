"""Which versions of our processes talk with each other.

A process says the protocol version that it speaks and the oldest that it understands, in the first message of every
stream and with every registration. Two understand each other if neither speaks an older one than the other understands.

`PROTOCOL` goes up with every change that a process of the version before would take wrongly: a field without which a
message means something else, a message that must be answered. Fields that may be missing need no new version. A change
that raises it keeps the way of the version before for one more, so that a cluster is upgraded a process at a time: N
talks with N-1 and N+1. Two versions apart is refused at the first word.
"""

from __future__ import annotations

from typing import Any, NamedTuple

PROTOCOL = 1
OLDEST_PROTOCOL = PROTOCOL - 1  # 0: processes from before there were numbers


class Speaks(NamedTuple):
    version: int
    oldest: int

    def why_not(self, other: Speaks, us: str, them: str) -> str:
        """Empty: they understand each other. Else what is to be told: cause and fix."""
        if other.version < self.oldest:
            old, new = f"{them} speaks protocol {other.version}", f"{us} understands {self.oldest} to {self.version}"
        elif self.version < other.oldest:
            old, new = f"{us} speaks protocol {self.version}", f"{them} understands {other.oldest} to {other.version}"
        else:
            return ""
        return f"{old} and {new}; upgrade one version at a time (docs/operations.md, Upgrades)"


OURS = Speaks(PROTOCOL, OLDEST_PROTOCOL)


def spoken(message: Any) -> Speaks:
    """By a message with the fields `protocol` and `oldest_protocol`."""
    return Speaks(message.protocol, message.oldest_protocol)
