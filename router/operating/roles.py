"""Which workers change their role so that so many have each. Pure; the operator (router/operating/operator.py) acts.

Fewest switches first: who is too many in one role takes the other that lacks somebody, then standbys do, and who is
left over stands by. Roles that lack somebody are filled before any is emptied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from router.errors import Code, Failure
from router.placement.cluster import Role
from router.placement.view import WorkerKey


class Standing(NamedTuple):
    """A ready worker. `busy`: what it has to do, in any measure: the least busy ones switch."""

    key: WorkerKey
    role: Role
    busy: float = 0.0


class Switch(NamedTuple):
    key: WorkerKey
    before: Role
    role: Role


_WORKING = (Role.DECODE, Role.PREFILL)
_WITHOUT = {
    Role.DECODE: "without one nothing is answered",
    Role.PREFILL: "without one every prompt is computed on decode workers",
}


def needed(workers: Sequence[Standing], wanted: Mapping[Role, int]) -> int:
    """How many workers; `wanted` as in `plan`."""
    return sum(wanted.get(role, sum(w.role is role for w in workers)) for role in _WORKING)


def plan(workers: Sequence[Standing], wanted: Mapping[Role, int]) -> list[Switch] | Failure:
    """`wanted`: of PREFILL and DECODE; a role that is not named stays as it is."""
    of = {role: sorted((w for w in workers if w.role is role), key=lambda w: (w.busy, w.key)) for role in Role}
    counts = {role: wanted.get(role, len(of[role])) for role in _WORKING}
    asked_for = needed(workers, wanted)
    if asked_for > len(workers):
        there = ", ".join(f"{len(of[role])} {role.value}" for role in Role)
        asked = f"prefill={counts[Role.PREFILL]} decode={counts[Role.DECODE]}"
        more = asked_for - len(workers)
        return Failure(
            Code.FAILED_PRECONDITION,
            f"{asked} needs {asked_for} workers and {len(workers)} are ready ({there}); start {more} more: raise "
            "prefill.replicas, decode.replicas or standby.replicas in cluster.yaml and deploy it again (under Ray "
            "Serve; a cluster of --no-ray is started anew), then repeat. Nothing was switched",
        )
    surplus = {role: of[role][: max(0, len(of[role]) - counts[role])] for role in _WORKING}
    switches: list[Switch] = []
    for role, other in ((Role.DECODE, Role.PREFILL), (Role.PREFILL, Role.DECODE)):
        lacking = counts[role] - len(of[role])
        for giver in (surplus[other], of[Role.STANDBY]):
            while lacking > 0 and giver:
                switches.append(Switch(giver[0].key, giver[0].role, role))
                del giver[0]
                lacking -= 1
    switches += [Switch(w.key, w.role, Role.STANDBY) for role in _WORKING for w in surplus[role]]
    return sorted(switches, key=lambda s: (s.before is not Role.STANDBY, s.role is Role.STANDBY))


def last_of_its_role(key: WorkerKey, role: Role, to: Role, others: int) -> Failure | None:
    """`others`: ready workers that have the role and keep it."""
    if role is to or others or role is Role.STANDBY:
        return None
    return Failure(
        Code.FAILED_PRECONDITION,
        f"{key.worker_id} is the last {role.value} worker, and {_WITHOUT[role]}; give the role to another one first "
        f"(`diptych switch WORKER --to {role.value}`), or force it (--force)",
    )
