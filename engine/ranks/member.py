"""A rank that follows, as the model that it loads knows it."""

from __future__ import annotations

from engine.ranks.group import Group
from engine.ranks.place import Place


class Member:
    def __init__(self, place: Place, group: Group) -> None:
        self.place, self.group = place, group
        self.sum, self.join = group.sum, group.join
