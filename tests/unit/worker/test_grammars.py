"""Sequences with a grammar on both workers: compiled beside the engine, exact, ended with a cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.types import FinishReason, SamplingParams
from grammar.structured import Kind, Structured
from tests.support.pair import LINK, Host, Pair
from tests.support.scripted import expected_answer
from worker.compiling import LONGEST_COMPILE_S
from worker.messages import (
    CancelSequence,
    Code,
    ContinueLocally,
    Drain,
    GrammarCompiled,
    HandoffRef,
    RouterLost,
    StartSequence,
)

GREEDY = SamplingParams(max_tokens=6)
PROMPT = list(range(20, 33))
ANSWER = expected_answer(PROMPT, GREEDY)
FORMAT = Structured(Kind.REGEX, "x")


@dataclass
class Matcher:
    """Takes `length` tokens; then the answer is complete, or it cannot go on."""

    length: int
    fails: bool
    taken: list[int] = field(default_factory=list)

    def advance(self, tokens: Sequence[int]) -> bool:
        self.taken += tokens
        return not (self.fails and len(self.taken) > self.length)

    @property
    def complete(self) -> bool:
        return not self.fails and len(self.taken) == self.length

    error = "out of tokens"
    broken = False


@dataclass
class Grammars:
    """`ready`: compiled already, as (length, fails)."""

    ready: tuple[int, bool] | None = None
    asked: list[Structured] = field(default_factory=list)

    def find(self, structured: Structured) -> Any:
        self.asked.append(structured)
        return self if self.ready is not None else None

    def start(self) -> Any:
        assert self.ready is not None
        return Matcher(*self.ready)

    def keep(self, compiled: GrammarCompiled) -> None:
        pass


def pair_of(ready: tuple[int, bool] | None) -> Pair:
    pair = Pair()
    for host in (pair.p, pair.d):
        host.core.grammars = Grammars(ready)
    return pair


def compiled(pair: Pair, host: Host, length: int = 4, error: str = "") -> None:
    grammars: Any = host.core.grammars
    grammars.ready = None if error else (length, False)
    host.core.handle(GrammarCompiled(FORMAT, None if error else grammars, error), pair.now)


def start(number: int, emitted: Sequence[int] = (), **more: Any) -> StartSequence:
    return StartSequence(number, str(number), PROMPT, emitted, GREEDY, structured=FORMAT, **more)


def split(pair: Pair, number: int) -> None:
    pair.to(pair.d, start(number, pull=HandoffRef("h", pair.p.peer, "")))
    pair.to(pair.p, start(number, serve_handoff_id="h"))


def ended(host: Host, number: int) -> tuple[FinishReason | None, int]:
    end = host.end(number)
    assert end is not None
    return end.reason, end.code


@pytest.mark.parametrize("length", [2, 3, 5])
def test_split_the_answer_ends_where_its_grammar_does(length: int) -> None:
    pair = pair_of((length, False))
    split(pair, 1)
    pair.run()
    assert pair.p.tokens(1) == ANSWER[:1]
    assert pair.d.tokens(1) == ANSWER[:length]
    assert ended(pair.d, 1) == (FinishReason.STOP, 0)
    pair.assert_nothing_left()


def test_a_first_token_that_completes_the_answer_ends_it_on_prefill() -> None:
    pair = pair_of((1, False))
    split(pair, 1)
    pair.run(until_s=1.0)
    assert ended(pair.p, 1) == (FinishReason.STOP, 0)
    pair.to(pair.d, CancelSequence(1))  # as the router does
    pair.run()
    pair.assert_nothing_left()


@pytest.mark.parametrize("emitted", [1, 3])
def test_a_resumed_answer_ends_at_the_same_place(emitted: int) -> None:
    pair = pair_of((3, False))
    pair.to(pair.d, start(1, ANSWER[:emitted]))
    pair.run()
    assert pair.d.tokens(1) == ANSWER[emitted:3], "nothing at all, if it was complete"
    assert ended(pair.d, 1) == (FinishReason.STOP, 0)
    pair.assert_nothing_left()


def test_a_handoff_that_fails_goes_on_with_the_same_grammar() -> None:
    pair = pair_of((3, False))
    pair.to(pair.d, start(1, pull=HandoffRef("nowhere", pair.p.peer, "")))
    pair.to(pair.d, ContinueLocally(1, ANSWER[:1]))
    pair.run()
    assert pair.d.tokens(1) == ANSWER[1:3]
    pair.to(pair.d, start(2, pull=HandoffRef("nowhere", pair.p.peer, "")))
    pair.to(pair.d, ContinueLocally(2, ANSWER[:3]))  # complete: only its end was lost
    pair.run()
    assert pair.d.tokens(2) == []
    assert ended(pair.d, 2) == (FinishReason.STOP, 0)
    pair.assert_nothing_left()


@pytest.mark.parametrize(("length", "where"), [(0, "p"), (2, "d")])
def test_a_grammar_that_cannot_go_on_is_an_error_and_no_token(length: int, where: str) -> None:
    pair = pair_of((length, True))
    split(pair, 1)
    pair.run(until_s=1.0)
    host = pair.p if where == "p" else pair.d
    assert ended(host, 1) == (None, Code.INVALID_ARGUMENT)
    end = host.end(1)
    assert end is not None
    assert "out of tokens" in end.error
    assert host.tokens(1) == ANSWER[:length]
    pair.to(pair.d, CancelSequence(1))
    pair.run()
    pair.assert_nothing_left()


def test_sequences_wait_for_their_grammar_and_what_is_said_meanwhile_counts() -> None:
    pair = pair_of(None)
    pair.to(pair.d, start(1), start(2), start(3, pull=HandoffRef("nowhere", pair.p.peer, "")))
    pair.to(pair.d, CancelSequence(2), ContinueLocally(3, ANSWER[:1]))
    pair.to(pair.d, StartSequence(4, "4", PROMPT, (), GREEDY))
    pair.run(until_s=1.0)
    assert pair.d.tokens(4) == ANSWER, "nobody else waits"
    assert not pair.d.core.is_idle()
    compiled(pair, pair.d)
    pair.run()
    assert pair.d.tokens(1) == ANSWER[:4]
    assert pair.d.tokens(3) == ANSWER[1:4]
    assert pair.d.end(2) is None
    pair.assert_nothing_left()


def test_a_grammar_that_cannot_be_compiled_is_refused() -> None:
    pair = pair_of(None)
    pair.to(pair.d, start(1))
    compiled(pair, pair.d, error="unknown special token")
    pair.run()
    end = pair.d.end(1)
    assert end is not None
    assert end.code == Code.INVALID_ARGUMENT
    assert end.error.startswith("the grammar of `structured` cannot be used: unknown special token; ")
    pair.assert_nothing_left()


def test_the_wait_ends_with_the_link_the_drain_or_the_time() -> None:
    pair = pair_of(None)
    pair.to(pair.d, start(1))
    pair.to(pair.d, start(1))  # in use
    assert [e.code for e in pair.d.core.take_outbox().links[LINK].ends] == [Code.INTERNAL]  # type: ignore[union-attr]
    pair.d.core.tick(pair.now + LONGEST_COMPILE_S)
    pair.run()
    assert ended(pair.d, 1) == (None, Code.DEADLINE_EXCEEDED)
    pair.to(pair.d, start(2, deadline_s=0.5))
    assert pair.d.core.next_deadline() <= pair.now + 1.5
    pair.d.core.handle(Drain(), pair.now)
    pair.run()
    assert ended(pair.d, 2) == (None, Code.UNAVAILABLE)
    other = pair_of(None)
    other.to(other.d, start(3))
    other.d.core.handle(RouterLost(LINK), other.now)
    assert other.d.core.is_idle()


def test_a_worker_without_grammars_says_so() -> None:
    pair = Pair()
    pair.to(pair.d, start(1))
    pair.run()
    assert ended(pair.d, 1) == (None, Code.INVALID_ARGUMENT)
