"""How many workers of each role: one pair, within a budget of GPUs. Pure.

    adopt      a count that is not what was decided last was set by hand: it stays for a while
    withdraw   what has found no place for some time is asked for no more, and counts as spent until then
    zero       an idle cluster has no workers (if so configured); otherwise no role is ever without one
    shrink     nothing is above the budget, whoever asked for it
    shift      short in one role: a worker of the other changes sides, if that one can spare it (one interval)
    wake       still short: a standby (seconds)
    start      still short when a start would be over: a worker is started, if that stands for a second look (minutes)
    peak       fewer would do, and a peak that came faster than a start needed what is there: it is kept for a while
    stop       fewer would do, under their larger share of the load and with room to spare, for as long as `hold_s`

The first of these that applies is the decision; each call makes one kind of move, and no call raises and lowers the
number of workers at once. A shift lowers one count and raises the other in the same move, so the budget holds at every
moment. What is draining counts against the budget until it is gone; so nothing is stopped to make room for a start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from scaling.config import ScalingConfig
from scaling.decision import Alternative, Decision
from scaling.demand import Demand, Load, demand, sample, strain
from scaling.observation import Observation, Pool, Stage
from scaling.peaks import Floor, floor, noted
from scaling.state import ScalingState
from scaling.weighing import Bounds, Pair, Terms, balanced, bounds, smallest, spent_gpus, worst

_BETTER = 0.1  # of strain, that a shift must gain
_AGAIN_SHIFT_INTERVALS = 2
_UNAPPLIED_INTERVALS = 2  # so long the platform may take to say what it was told
_HELD_BACK_S = 30.0  # so long after somebody was missing, what was held back may still be coming
_SHORT_NOW = 1.3  # strained so much at once, a start waits for no second look
_SOON_STARTS = 4.0  # a start within so many start times of a stop shows that the stop was too early
_LONGER = 1.2  # than it would have taken: so long the next stop waits
_MOST_STOPPED_SHARE = 0.5  # of all workers, in one decision

Result = tuple[Decision, ScalingState]


def decide(seen: Observation, state: ScalingState, config: ScalingConfig, terms: Terms) -> Result:
    """Total: whatever is seen, there is a decision. `config.budget_gpus` must be set."""
    return _Call(seen, state, config, terms).result()


class _Call:
    """One decision's working values."""

    def __init__(self, seen: Observation, state: ScalingState, config: ScalingConfig, terms: Terms) -> None:
        assert config.budget_gpus is not None
        self.seen, self.config, self.terms = seen, config, terms
        self.budget: float = config.budget_gpus
        keep_from = seen.now - config.window_s
        history = (*(s for s in state.history if s.at > keep_from), sample(seen))
        took = [w.started_in_s for w in seen.workers if w.started_in_s > 0]
        self.start_s = sum(took) / len(took) if took else state.start_s or config.start_s
        self.demand: Demand = demand(seen, history, state.capacity, config, terms.itl_target_ms)
        asked = seen.live_requests or seen.queued_requests or seen.arrived_requests
        last_request = seen.now if asked or state.last_request is None else state.last_request
        self.state = replace(
            state,
            history=history,
            capacity=self.demand.capacity,
            start_s=self.start_s if took else state.start_s,
            last_request=last_request,
            starting_at=seen.now if self._starting() else state.starting_at,
        )
        self.placed = sum(w.stage in (Stage.READY, Stage.STARTING) and w.pool is not None for w in seen.workers)
        if self.placed > state.placed_workers and state.refusals:
            self.state = replace(self.state, refusals=0, refused_until=-math.inf)
        alive = (Stage.STARTING, Stage.UNSCHEDULABLE, Stage.READY)
        have = seen.count(Pool.PREFILL, *alive), seen.count(Pool.DECODE, *alive)
        self.have: Pair = have
        self.ready: Pair = seen.count(Pool.PREFILL, Stage.READY), seen.count(Pool.DECODE, Stage.READY)
        self.asked: Pair = (
            have[0] if seen.prefill_target is None else seen.prefill_target,
            have[1] if seen.decode_target is None else seen.decode_target,
        )
        self.leaving_gpus = spent_gpus(seen, terms)
        self.pinned = self._adopted()
        self.numbers: dict[str, float] = {}
        self.alternatives: tuple[Alternative, ...] = ()

    def _starting(self) -> bool:
        return any(w.stage is Stage.STARTING and w.pool is not None for w in self.seen.workers)

    # What was set by hand.

    def _adopted(self) -> dict[Pool, int]:
        """Counts that somebody else set and that still stand."""
        state, now = self.state, self.seen.now
        by_hand = state.by_hand
        if state.told is not None and not self.config.dry_run:
            fresh = now - state.told_at <= _UNAPPLIED_INTERVALS * self.config.interval_s + 1e-9
            for i, asked in enumerate(self.asked):
                if asked != state.told[i] and not (fresh and asked == state.told_from[i]):
                    until = now + self.config.hand_hold_s
                    by_hand = replace(by_hand, **{("prefill_until", "decode_until")[i]: until})
            self.state = replace(state, by_hand=by_hand)
        pinned = {}
        if by_hand.prefill_until > now:
            pinned[Pool.PREFILL] = self.asked[0]
        if by_hand.decode_until > now:
            pinned[Pool.DECODE] = self.asked[1]
        return pinned

    # The order of rules.

    def result(self) -> Result:
        idle = self._idle()
        if idle is not None:
            return idle
        base, limits = self._within_limits()
        if base != self.asked:
            return self._told(base, "limits", self._limits_words(base))
        withdrawn = self._withdrawn(base)
        if withdrawn is not None:
            return withdrawn
        if not self.demand.capacity.known:
            return self._told(base, "nothing_measured", "no worker has measured yet what it can do")
        return self._sized(base, limits)

    def _withdrawn(self, base: Pair) -> Result | None:
        c, now = self.config, self.seen.now
        late = [w for w in self.seen.workers if w.stage is Stage.UNSCHEDULABLE and w.age_s >= c.unschedulable_after_s]
        lost = sum(w.pool is Pool.PREFILL for w in late), sum(w.pool is Pool.DECODE for w in late)
        to = max(c.prefill.min, base[0] - lost[0]), max(c.decode.min, base[1] - lost[1])
        count = sum(base) - sum(to)
        if count <= 0:
            return None
        wait_s = c.retry_s * 2.0 ** min(self.state.refusals, 6)
        self.state = replace(
            self.state,
            refused_until=now + wait_s,
            refusals=self.state.refusals + 1,
            placed_workers=self.placed,
            short_since=None,
        )
        why = f"{count} found no place within {c.unschedulable_after_s:g} s; asked for again in {wait_s:.0f} s"
        return self._told(to, "withdrawn", why, withdrawn=count)

    def _idle(self) -> Result | None:
        """Scale to zero, and back."""
        c, now, last = self.config, self.seen.now, self.state.last_request
        smallest_pools = c.prefill.min, c.decode.min
        if c.idle_s is None:
            if self.asked == (0, 0):
                return self._told(smallest_pools, "from_zero", "a cluster that is not scaled to zero has workers")
            return None
        assert last is not None
        idle_s = now - last
        self.numbers["idle_s"] = idle_s
        if self.asked == (0, 0):
            if idle_s > 0:
                return self._told((0, 0), "idle", f"no request for {idle_s:.0f} s")
            return self._told(smallest_pools, "from_zero", "a request waits")
        # A pool that is slow to start is not stopped before it was of use.
        if min(idle_s, now - self.state.starting_at) >= c.idle_s and not self.pinned:
            self.state = replace(self.state, short_since=None, ample_since=None)
            return self._told((0, 0), "to_zero", f"no request for {idle_s:.0f} s (idle_s: {c.idle_s:g})")
        return None

    def _within_limits(self) -> tuple[Pair, Bounds]:
        """The counts as they are, no larger and no smaller than allowed. This never adds beyond the smallest pools."""
        c, terms = self.config, self.terms
        limits = bounds(c, terms, {}, self.budget)
        prefill = min(max(self.asked[0], limits.prefill[0]), limits.prefill[1])
        decode = min(max(self.asked[1], limits.decode[0]), limits.decode[1])
        while terms.gpus((prefill, decode)) > self.budget + 1e-9:  # by hand, or the budget was lowered
            if prefill - c.prefill.min > decode - c.decode.min:
                prefill -= 1
            else:
                decode -= 1
        base = prefill, decode
        pinned = {p: n for p, n in self.pinned.items() if base[p is Pool.DECODE] == n}
        # What the platform has not let go of yet is spent as well.
        surplus = max(0, self.have[0] - base[0]), max(0, self.have[1] - base[1])
        gpus = self.budget - self.leaving_gpus - terms.gpus(surplus)
        limits = bounds(c, terms, pinned, max(gpus, terms.gpus(base)))
        return base, limits

    def _limits_words(self, base: Pair) -> str:
        return (
            f"{self.asked[0]} prefill and {self.asked[1]} decode are outside what is allowed: a budget of "
            f"{self.budget:g} GPUs, at least {self.config.prefill.min} and {self.config.decode.min}"
        )

    def _sized(self, base: Pair, limits: Bounds) -> Result:
        c = self.config
        lead_s = self.start_s + c.interval_s
        soon = self.demand.load(c.interval_s, self.ready, c)
        later = self.demand.load(lead_s, base, c)
        self._note(soon, later, lead_s, base, limits)
        total = sum(base)
        now_strain, later_strain = worst([soon], self.ready), worst([later], base)
        short_now, short_later = now_strain > 1.0, later_strain > 1.0
        kept = self._kept(now_strain, base)

        if short_now or short_later:
            self.state = replace(self.state, ample_since=None)
            shift = self._shift(soon, later, base, limits, short_now=short_now)
            if shift is not None:
                return shift
            found = smallest([later], limits, base, total, limits.most, 1.0, grow_only=not c.shift_roles)
            wanted = found if found is not None else self._most(later, base, limits)
            if sum(wanted) > total:
                return self._more(base, wanted, limits, now_strain, later_strain, enough=found is not None)
            if found is None or sum(found) > total:
                self.state = replace(self.state, short_since=None)
                return self._told(base, "budget", f"short, and the budget of {self.budget:g} GPUs is spent")
            self.state = replace(self.state, short_since=None)
            return self._told(base, "waiting", "short until what is starting is ready, or the other role is free")
        self.state = replace(self.state, short_since=None)

        loads = [soon, later] if kept is None else [soon, later, kept.load]
        fewer = smallest(loads, limits, base, limits.least, total - 1, c.down_margin)
        if fewer is None:
            # Chance moves the load across the line now and then; what would be short begins anew.
            if smallest([soon, later], limits, base, limits.least, total - 1, 1.0) is None:
                self.state = replace(self.state, ample_since=None)
            elif kept is not None:
                why = f"fewer would do; a peak that came faster than a start is expected for {kept.left_s:.0f} s more"
                return self._told(base, "peak", why)
            return self._told(base, "steady", "enough, and one fewer would not be")
        return self._fewer(base, fewer, limits, loads)

    def _kept(self, strained: float, base: Pair) -> Floor | None:
        """What a peak needed that came faster than anybody starts, for as long as it may come again."""
        arriving = self.demand.arriving(self.config)
        now, peaks = self.seen.now, self.state.peaks
        if not self.ready == self.have == base:
            self.state = replace(self.state, unsettled_at=now)
        # What was held back while somebody was missing comes all at once, and is no peak.
        settled = now - self.state.unsettled_at > _HELD_BACK_S and worst([arriving], self.ready) > 1.0
        peaks = noted(peaks, now, arriving, strained, self.start_s, settled=settled)
        self.state = replace(self.state, peaks=peaks)
        kept = floor(peaks, now, self.start_s)
        if kept is not None:
            self.numbers |= {
                "peak_prefill_load": kept.load.prefill,
                "peak_decode_load": kept.load.decode,
                "peak_kept_s": kept.left_s,
            }
        return kept

    # Moves.

    def _shift(self, soon: Load, later: Load, base: Pair, limits: Bounds, *, short_now: bool) -> Result | None:
        c, now, ready = self.config, self.seen.now, self.ready
        since = now - self.state.last_shift
        if not c.shift_roles or self.pinned or since < _AGAIN_SHIFT_INTERVALS * c.interval_s - 1e-9:
            return None
        loads = [soon, later]

        def both(k: int) -> float:
            """Strain with `k` of the ready decode workers as prefill workers, now and later."""
            return max(worst([soon], (ready[0] + k, ready[1] - k)), worst([later], (base[0] + k, base[1] - k)))

        def possible(k: int) -> bool:
            # Who stays in the giving role must be at work, not about to be.
            enough = ready[0] + k >= c.prefill.min and ready[1] - k >= c.decode.min
            return k != 0 and enough and limits.allows((base[0] + k, base[1] - k))

        counts = [k for k in range(-ready[0], ready[1] + 1) if possible(k)]
        if not counts:
            return None
        k = min(counts, key=lambda k: (both(k), abs(k)))
        gained = both(0) - both(k)
        if both(k) > 1.0 and short_now:
            # Nothing holds for both; what helps now counts.
            k = min(counts, key=lambda k: (worst([soon], (ready[0] + k, ready[1] - k)), abs(k)))
            gained = worst([soon], ready) - worst([soon], (ready[0] + k, ready[1] - k))
        elif both(k) > 1.0:
            return None
        if gained < _BETTER:
            return None
        pair = base[0] + k, base[1] - k
        self.state = replace(self.state, last_shift=now, short_since=None)
        giving, taking = ("decode", "prefill") if k > 0 else ("prefill", "decode")
        why = (
            f"{taking} is short and {giving} can spare {abs(k)}: strain {worst(loads, base):.2f} becomes {both(k):.2f}"
        )
        return self._told(pair, f"shift_to_{taking}", why, shifted=k)

    def _most(self, later: Load, base: Pair, limits: Bounds) -> Pair:
        """All that the budget allows, where it is not enough."""
        for total in range(limits.most, sum(base), -1):
            found = balanced([later], [p for p in limits.pairs(total) if p[0] >= base[0] and p[1] >= base[1]], base)
            if found is not None:
                return found[1]
        return base

    def _more(
        self, base: Pair, wanted: Pair, limits: Bounds, now_strain: float, later_strain: float, *, enough: bool
    ) -> Result:
        c, now, seen = self.config, self.seen.now, self.seen
        count = sum(wanted) - sum(base)
        standing = seen.count(None, Stage.STANDBY)
        if any(w.stage is Stage.UNSCHEDULABLE for w in seen.workers):
            count = min(count, standing)
            if count <= 0:
                return self._told(base, "no_place", "short, and what was asked for has found no place yet")
        if now < self.state.refused_until:
            count = min(count, standing)
            if count <= 0:
                wait_s = self.state.refused_until - now
                why = f"short, and there was no place for more; asked for again in {wait_s:.0f} s"
                return self._told(base, "no_place", why)
        since = self.state.short_since if self.state.short_since is not None else now
        self.state = replace(self.state, short_since=since)
        if count > standing and now - since < c.interval_s - 1e-9 and now_strain < _SHORT_NOW:
            if not standing:
                return self._told(base, "short", "more are wanted; they are started if that stands for a second look")
            count = standing
        pairs = [p for p in limits.pairs(sum(base) + count) if p[0] >= base[0] and p[1] >= base[1]]
        later = self.demand.load(self.start_s + c.interval_s, base, c)
        found = balanced([later], pairs, base)
        if found is None:
            return self._told(base, "budget", f"short, and the budget of {self.budget:g} GPUs leaves no room")
        self._learn_hold()
        woken = min(count, standing)
        strained = f"strain {max(now_strain, later_strain):.2f} within {self.start_s + c.interval_s:.0f} s"
        rest = "" if enough else f"; more would be wanted, and the budget is {self.budget:g} GPUs"
        if woken == count:
            return self._told(found[1], "wake", f"{strained}: {woken} standby is woken{rest}", woken=woken)
        why = f"{strained}, no shift mends it: {count - woken} started" + (f", {woken} woken" if woken else "") + rest
        return self._told(found[1], "start", why, woken=woken, started=count - woken)

    def _learn_hold(self) -> None:
        """More workers than now: was the last stop too early?"""
        now, s = self.seen.now, self.state
        most_s = _SOON_STARTS * self.start_s
        if now - s.stopped_at <= most_s:
            wanted_s = min(most_s, _LONGER * (now - s.ample_before_stop))
            s = replace(s, hold_s=max(self._learned_hold(), wanted_s), hold_learned_at=now, stopped_at=-math.inf)
        self.state = replace(s, short_since=None)

    def _learned_hold(self) -> float:
        """Half of it is forgotten in the time that a stop may be a mistake."""
        s = self.state
        return (
            s.hold_s * 0.5 ** ((self.seen.now - s.hold_learned_at) / (_SOON_STARTS * self.start_s)) if s.hold_s else 0.0
        )

    def _fewer(self, base: Pair, fewer: Pair, limits: Bounds, loads: Sequence[Load]) -> Result:
        c, now = self.config, self.seen.now
        # A load that has fallen for minutes is not about to jump; one that fell at once may.
        falling = min(self.demand.uncached_per_s.slope, self.demand.requests_per_s.slope) < 0
        learned_s = 0.0 if falling else self._learned_hold()
        hold_s = max(self.start_s / 2, learned_s) if c.hold_s is None else c.hold_s
        since = self.state.ample_since if self.state.ample_since is not None else now
        self.state = replace(self.state, ample_since=since)
        self.numbers["ample_for_s"], self.numbers["hold_s"] = now - since, hold_s
        if now - since < hold_s - 1e-9:
            return self._told(base, "hold", f"{sum(fewer)} would do for {now - since:.0f} s; {hold_s:.0f} s are wanted")
        # What is starting and not wanted any more may go at once. Of what is at work, only if nobody is missing.
        if self.ready != base and sum(self.have) - sum(self.ready) < sum(base) - sum(fewer):
            return self._told(
                base, "waiting", "fewer would do; first those that are missing or starting are waited for"
            )
        total = sum(base)
        low = max(sum(fewer), total - max(1, int(total * _MOST_STOPPED_SHARE)))
        for n in range(low, total):
            pairs = [p for p in limits.pairs(n) if p[0] <= base[0] and p[1] <= base[1]]
            found = balanced(loads, pairs, base)
            if found is not None and found[0] <= c.down_margin:
                count = total - n
                value = worst(loads, found[1])
                why = f"{count} fewer carry their larger share at a strain of {value:.2f} (at most {c.down_margin:g})"
                self.state = replace(self.state, stopped_at=now, ample_before_stop=since, ample_since=None)
                return self._told(found[1], "stop", why, stopped=count)
        # One fewer would do, with the roles otherwise: first the shift.
        step = 1 if fewer[0] > base[0] else -1
        pair = base[0] + step, base[1] - step
        after = self.ready[0] + step, self.ready[1] - step
        if c.shift_roles and not self.pinned and limits.allows(pair) and worst(loads, pair) <= 1.0 and min(after) > 0:
            self.state = replace(self.state, last_shift=now)
            taking = "prefill" if step > 0 else "decode"
            return self._told(pair, f"shift_to_{taking}", "one fewer will do after this shift", shifted=step)
        return self._told(base, "steady", "fewer would do only with other roles")

    # Words and numbers.

    def _told(
        self,
        pair: Pair,
        rule: str,
        why: str,
        *,
        shifted: int = 0,
        woken: int = 0,
        started: int = 0,
        withdrawn: int = 0,
        stopped: int = 0,
    ) -> Result:
        c, now, terms = self.config, self.seen.now, self.terms
        change = sum(pair) - sum(self.asked)
        if not (woken or started) and change > 0:
            woken = min(change, self.seen.count(None, Stage.STANDBY))
            started = change - woken
        if not (stopped or withdrawn) and change < 0:
            stopped = -change
        kept = max(0, self.have[0] - pair[0]) + max(0, self.have[1] - pair[1]) if not shifted else 0
        left = self.budget - self.leaving_gpus - terms.gpus(pair) - kept * terms.standby_gpus
        room = int((left + 1e-9) / terms.standby_gpus)
        held = now < self.state.refused_until
        standbys = max(0, min(c.standbys, room))
        if held:
            standbys = min(standbys, self.seen.count(None, Stage.STANDBY, Stage.STARTING))
        numbers = {
            "budget_gpus": self.budget,
            "held_gpus": terms.gpus(self.have) + self.leaving_gpus,
            "prefill_ready": float(self.ready[0]),
            "decode_ready": float(self.ready[1]),
            "starting": float(
                self.seen.count(Pool.PREFILL, Stage.STARTING) + self.seen.count(Pool.DECODE, Stage.STARTING)
            ),
            "draining": float(sum(w.stage is Stage.DRAINING for w in self.seen.workers)),
            "unschedulable": float(sum(w.stage is Stage.UNSCHEDULABLE for w in self.seen.workers)),
            "standbys": float(self.seen.count(None, Stage.STANDBY)),
            "start_s": self.start_s,
            **self.numbers,
        }
        if self.pinned:
            ends = max(self.state.by_hand.prefill_until, self.state.by_hand.decode_until)
            names = " and ".join(f"{p} {n}" for p, n in self.pinned.items())
            why = f"{why}; set by hand: {names}, kept for {ends - now:.0f} s more"
        decision = Decision(
            now, pair[0], pair[1], standbys, rule, why, shifted, woken, started, stopped, withdrawn, c.dry_run,
            numbers, self.alternatives,
        )  # fmt: skip
        told_from = self.asked if pair != self.asked else self.state.told_from
        told_at = now if pair != self.asked else self.state.told_at
        told = None if c.dry_run else pair
        return decision, replace(self.state, told=told, told_from=told_from, told_at=told_at)

    def _note(self, soon: Load, later: Load, lead_s: float, base: Pair, limits: Bounds) -> None:
        d, c = self.demand, self.demand.capacity
        self.numbers |= {
            "uncached_tokens_per_s": d.uncached_per_s.recent,
            "uncached_tokens_per_s_ahead": d.uncached_per_s.highest(lead_s),
            "requests_per_s": d.requests_per_s.recent,
            "requests_per_s_ahead": d.requests_per_s.highest(lead_s),
            "backlog_tokens": d.backlog_tokens,
            "backlog_s": d.backlog_tokens / c.prefill_tokens_per_s / max(1, self.ready[0]),
            "prefill_tokens_per_s_each": c.prefill_tokens_per_s,
            "resident_kv_tokens": d.kv_tokens.recent,
            "kv_tokens_each": c.kv_tokens,
            "step_ms": c.step_ms,
            "tokens_per_step": c.tokens_per_step,
            "prompt_tokens": d.prompt_tokens,
            "answer_tokens": c.answer_tokens,
            "ahead_s": lead_s,
            "prefill_load": soon.prefill,
            "decode_load": soon.decode,
            "prefill_load_ahead": later.prefill,
            "decode_load_ahead": later.decode,
            "prefill_spare": later.spare_prefill,
            "decode_spare": later.spare_decode,
        }
        prefill, decode = base
        options = [
            ((prefill, decode), "nothing", 0.0),
            ((prefill + 1, decode - 1), "shift", self.config.interval_s),
            ((prefill - 1, decode + 1), "shift", self.config.interval_s),
            ((prefill + 1, decode), "start", self.start_s),
            ((prefill, decode + 1), "start", self.start_s),
            ((prefill - 1, decode), "stop", self.config.interval_s),
            ((prefill, decode - 1), "stop", self.config.interval_s),
        ]
        if self.seen.count(None, Stage.STANDBY):
            options = [(p, "wake" if what == "start" else what, self.config.wake_s if what == "start" else s)
                       for p, what, s in options]  # fmt: skip
        shown = []
        for pair, what, takes_s in options:
            if min(pair) < 0:
                continue
            of_p, of_d = strain(later, *pair)
            fine = self.config.down_margin if what == "stop" else 1.0
            if not limits.allows(pair):
                verdict = "outside budget or bounds"
            elif max(of_p, of_d) > fine:
                verdict = "short" if what != "stop" else f"above {fine:g}"
            else:
                verdict = "would do"
            shown.append(Alternative(*pair, of_p, of_d, what, takes_s, verdict))
        self.alternatives = tuple(shown)
