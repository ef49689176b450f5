"""Prompt lookup: what it proposes, and that it never tells of what is not there."""

from __future__ import annotations

import random

import pytest

from engine.lookup import Lookup


@pytest.mark.parametrize(
    ("tokens", "most", "drafts"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 3, [3, 4, 5]),
        ([1, 2, 3, 9, 1, 2, 4, 8, 1, 2], 2, [4, 8]),  # of equal matches the newest
        ([7, 1, 2, 3, 9, 8, 1, 2, 4, 7, 1, 2], 2, [3, 9]),  # the longer match before the newer
        ([5, 6, 5, 6, 5, 6], 5, [5, 6, 5, 6, 5]),  # a repetition goes on
        ([3, 3, 3], 4, [3, 3, 3, 3]),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
        ([1, 2, 1, 2], 0, []),
    ],
)
def test_proposes_what_followed_the_last_time(tokens: list[int], most: int, drafts: list[int]) -> None:
    assert Lookup().drafts(tokens, most, 2) == drafts


def test_a_short_match_is_no_match_where_a_longer_one_is_asked_for() -> None:
    tokens = [9, 1, 2, 3, 8, 1, 2]
    assert Lookup().drafts(tokens, 2, 2) == [3, 8]
    assert Lookup().drafts(tokens, 2, 3) == []


def test_a_long_prompt_is_taken_in_over_several_looks() -> None:
    tokens = [*range(10_000), 5, 6]
    lookup = Lookup()
    looks = 1
    while not (drafts := lookup.drafts(tokens, 2, 2)):
        looks += 1
    assert drafts == [7, 8]
    assert looks == 5


def plainly(tokens: list[int], most: int, least: int) -> list[list[int]]:
    """All answers that are right: the longest match of at least `least`, from whichever place."""
    end, found = len(tokens), {}
    for place in range(1, end - 1):
        match = 0
        while match < 16 and match <= place and tokens[place - match] == tokens[end - 1 - match]:
            match += 1
        if match >= least:
            drafts = list(tokens[place + 1 : place + 1 + most])
            while len(drafts) < most:
                drafts.append((tokens + drafts)[place + 1 + len(drafts)])
            found.setdefault(match, []).append(drafts)
    return found[max(found)] if found else [[]]


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_a_plain_search(seed: int) -> None:
    rng = random.Random(seed)
    words = rng.choice([2, 4, 12])
    tokens = [rng.randrange(words) for _ in range(rng.randrange(2, 30))]
    lookup = Lookup()
    for _ in range(60):
        tokens += [rng.randrange(words) for _ in range(rng.randrange(1, 4))]
        most, least = rng.randrange(1, 6), rng.choice([2, 3])
        right = plainly(tokens, most, least)
        found = lookup.drafts(tokens, most, least)
        # Only the newest places are looked at: among few words an older, longer match may be passed over.
        assert found in right or (words < 12 and (not found or len(found) == most)), tokens
