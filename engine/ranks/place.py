"""Which part of a model a rank has. Pure arithmetic: every rank computes it for itself, and all come to the same.

Attention heads are split over all ranks. Experts are split by number over `expert_groups` groups of ranks, and each
expert's inner width over the ranks of a group:

    degree 4, expert_groups 2, 8 experts      rank   0        1        2        3
                                              heads  1st 1/4  2nd 1/4  3rd 1/4  4th 1/4
                                              experts 0-3     0-3      4-7      4-7
                                              of each 1st 1/2 2nd 1/2  1st 1/2  2nd 1/2
"""

from __future__ import annotations

from dataclasses import dataclass


class CannotSplit(Exception):
    """The model cannot be split so; the message ends "MODEL cannot be split over N ranks: ..."."""


def share(total: int, of: int, number: int) -> tuple[int, int]:
    """[start, end) of part `number` of `of`; parts differ by one at most."""
    return number * total // of, (number + 1) * total // of


@dataclass(frozen=True, slots=True)
class Place:
    """`rank` of `degree`; rank 0 leads. `expert_groups` divides `degree`."""

    rank: int
    degree: int
    expert_groups: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def heads(self, count: int) -> tuple[int, int]:
        """Of query heads. Raises CannotSplit."""
        if count % self.degree:
            raise CannotSplit(f"its {count} attention heads are no multiple of {self.degree}")
        return share(count, self.degree, self.rank)

    def kv_heads(self, count: int) -> tuple[int, int]:
        """Of heads that are kept: each on one rank, or, where they are fewer than ranks, one on several that follow
        each other. Raises CannotSplit.
        """
        if count % self.degree == 0:
            return share(count, self.degree, self.rank)
        if self.degree % count:
            raise CannotSplit(f"its {count} key and value heads are neither a multiple nor a part of {self.degree}")
        head = self.rank * count // self.degree
        return head, head + 1

    def experts(self, count: int) -> tuple[int, int]:
        """Raises CannotSplit."""
        if count < self.expert_groups:
            raise CannotSplit(f"it has {count} experts, fewer than {self.expert_groups} groups of ranks")
        return share(count, self.expert_groups, self.rank // self.ranks_an_expert)

    @property
    def ranks_an_expert(self) -> int:
        return self.degree // self.expert_groups

    @property
    def part_of_expert(self) -> int:
        return self.rank % self.ranks_an_expert

    def inner(self, width: int) -> tuple[int, int]:
        """Of an expert's inner width."""
        return share(width, self.ranks_an_expert, self.part_of_expert)

    def columns(self, width: int) -> tuple[int, int]:
        """Of anything else that is split evenly."""
        return share(width, self.degree, self.rank)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.degree}"
