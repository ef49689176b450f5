"""Several answers to one prompt: in every fourth seed some requests have one to seven further answers.

The draws are of their own: the requests and faults of a seed stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from router.request import Request

if TYPE_CHECKING:
    from tests.scenarios.scenario import SimClient

_MOST = 24  # answers that a seed adds
_JUST_BEHIND_S = 0.0001


def has_forks(seed: int) -> bool:
    return seed % 4 == 2


def further_answers(
    seed: int, clients: Iterable[SimClient], of: Callable[[Request], list[int]], *, eager: bool
) -> list[SimClient]:
    """`eager`: to cancel."""
    rng = random.Random(f"forks {seed}")
    further: list[SimClient] = []
    clients = list(clients)
    number = len(clients)
    for first in clients:
        if first.request.emitted or rng.random() < 0.5:
            continue
        for i in range(1, min(rng.randint(1, 7), _MOST - len(further)) + 1):
            r = first.request
            sampling = replace(r.sampling, seed=r.sampling.seed + i)
            request = replace(r, request_id=f"q{number}", sampling=sampling, again=True, beside=r.key)
            request = replace(request, arrived=r.arrived + i * _JUST_BEHIND_S)
            cancelled = rng.random() < (0.5 if eager else 0.15)
            cancel_at = request.arrived + rng.random() * rng.choice((0.05, 0.3, 1.0)) if cancelled else None
            further.append(
                replace(
                    first,
                    number=number,
                    request=request,
                    cancel_at=cancel_at,
                    expected=of(request),
                    tokens=[],
                    moves=[],
                )
            )
            number += 1
    return further
