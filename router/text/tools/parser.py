"""Reads tool calls out of an answer as it comes.

A parser is a generator that is sent one character after the other ("" at the end), so that it reads like a parser of a
whole text and gives the same whatever the pieces are. Nothing is lost: what turns out to be no call becomes text,
as it stood. Arguments are passed on while they are written; if they break then, what was passed on stays and the rest
becomes text.
"""

from __future__ import annotations

import json
from collections.abc import Generator

from router.text.tools.events import CallArguments, CallStart, Text, ToolEvent
from router.text.tools.json_text import At, JsonText

Reading = Generator[None, str, None]
Asking = Generator[None, str, bool]
Char = Generator[None, str, str]

_BLANK = " \t\n\r"
_ESCAPES = {chr(c): json.dumps(chr(c))[1:-1] for c in range(0x20)}
_WITHIN = (At.STRING, At.ESCAPE, At.HEX, At.WORD)


class ToolParser:
    """One answer. `known`: names of the tools that the request offers."""

    def __init__(self, known: frozenset[str]) -> None:
        self._known = known
        self._events: list[ToolEvent] = []
        self._back: list[str] = []
        self._ended = False
        self._read = ""  # since the beginning of what may be a call; said as text if it is none
        self.calls = 0
        self._run = self.run()
        next(self._run)

    def push(self, text: str) -> list[ToolEvent]:
        send = self._run.send
        for c in text:
            send(c)
        return self._take()

    def finish(self) -> list[ToolEvent]:
        """The answer is over. Call once."""
        if not self._ended:
            self._run.send("")
        return self._take()

    def _take(self) -> list[ToolEvent]:
        events, self._events = self._events, []
        return events

    def run(self) -> Reading:
        """A family's grammar. Never returns."""
        raise NotImplementedError

    # Out.

    def say(self, text: str) -> None:
        if not text:
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, Text):
            self._events[-1] = Text(last.text + text)
        else:
            self._events.append(Text(text))

    def start(self, name: str) -> None:
        self._events.append(CallStart(self.calls, name))
        self.calls += 1
        self._read = ""

    def argue(self, text: str) -> None:
        """Of the last call."""
        last = self._events[-1] if self._events else None
        if isinstance(last, CallArguments):
            self._events[-1] = CallArguments(last.index, last.text + text)
        else:
            self._events.append(CallArguments(self.calls - 1, text))

    def give_up(self) -> None:
        """It is no call after all."""
        read, self._read = self._read, ""
        self.say(read)

    # In.

    def next(self) -> Char:
        """The next character; "" at the end, for ever."""
        if self._back:
            c = self._back.pop()
        elif self._ended:
            c = ""
        else:
            c = yield
            self._ended = c == ""
        self._read += c
        return c

    def unread(self, c: str) -> None:
        if c:
            self._back.append(c)
            self._read = self._read[: -len(c)]

    def blanks(self) -> Reading:
        while (c := (yield from self.next())) and c in _BLANK:
            pass
        self.unread(c)

    def peek(self) -> Char:
        c = yield from self.next()
        self.unread(c)
        return c

    def expect(self, word: str) -> Asking:
        """Reads up to the first difference."""
        for wanted in word:
            c = yield from self.next()
            if c != wanted:
                self.unread(c)
                return False
        return True

    def one_of(self, words: tuple[str, ...]) -> Char:
        """Whichever of the words comes; "" if none."""
        found = ""
        while found not in words:
            c = yield from self.next()
            if not c or not any(word.startswith(found + c) for word in words):
                self.unread(c)
                return ""
            found += c
        return found

    def until(self, word: str, longest: int) -> Char:
        """What comes before `word`, which is read too; "" if it is nothing, or longer than `longest`."""
        found = ""
        while len(found) < longest + len(word):
            c = yield from self.next()
            if not c:
                return ""
            found += c
            if found.endswith(word):
                return found[: -len(word)]
        return ""

    def text_until(self, marker: str, lead: str = "") -> Reading:
        """Says what comes before the marker, which is read. `lead`: blanks that count only if text follows them."""
        held = self._read = ""
        while held != marker:
            c = yield from self.next()
            self._read = ""
            if not c:
                self.say(lead + held if held else "")
                yield from self.rest()
            held += c
            while not marker.startswith(held):
                self.say(lead + held[0])
                lead, held = "", held[1:]
        self._read = marker

    def lead(self) -> Char:
        """The blanks that follow a call."""
        self._read = ""
        yield from self.blanks()
        lead, self._read = self._read, ""
        return lead

    def rest(self) -> Reading:
        """All that follows is text. Does not come back."""
        self.give_up()
        while True:
            c = yield from self.next()
            self._read = ""
            self.say(c)
            while not c:
                yield  # the end is the last that is sent

    # Calls.

    def json_call(self, keys: tuple[str, ...], *, known_only: bool = False) -> Asking:
        """{"name": ..., "arguments": {...}}, in any order; an opening brace is next. `keys` may hold the arguments.

        False: it is broken, or no call; what was not passed on is in `_read`.
        """
        text = JsonText()
        name = key = value = ""
        arguments: str | None = None  # complete, and not passed on yet
        started = passing = in_value = False
        while text.at is not At.DONE:
            c = yield from self.next()
            before, depth = text.at, text.depth
            at = text.feed(c) if c else At.BROKEN
            if at is At.BROKEN:
                self.unread(c)
                return False
            over = False
            if in_value:
                if before is not At.WORD or at is At.WORD or depth > 1:
                    written = _ESCAPES.get(c, c) if before is At.STRING else c
                    if passing:
                        self._read = ""
                        self.argue(written)
                    else:
                        value += written
                over = text.depth <= 1 and at not in _WITHIN
            elif depth == 1 and before in _WITHIN:
                key += c if at is not At.COLON else ""
            elif depth == 1 and at is At.STRING and before is not At.VALUE:
                key = ""
            elif depth == 1 and before is At.VALUE and at is not At.VALUE:
                in_value, value = True, c
                passing = c == "{" and key in keys and bool(name) and not started
                if passing:
                    if known_only and name not in self._known:
                        return False
                    self.start(name)
                    self.argue(c)
                    started = True
            if not over:
                continue
            in_value = False
            if passing:
                passing = False
            elif key == "name" and not started:
                name = _string(value)
            elif key in keys and not started:
                arguments = _object(value)
                if arguments is None:
                    return False
        if not started:
            if not name or (known_only and name not in self._known):
                return False
            self.start(name)
            self.argue(arguments or "{}")
        self._read = ""
        return True

    def json_arguments(self, name: str) -> Asking:
        """The arguments alone; an opening brace is next. False: broken, or cut off; the call stands."""
        self.start(name)
        text = JsonText()
        while text.at is not At.DONE:
            c = yield from self.next()
            before = text.at
            if not c or text.feed(c) is At.BROKEN:
                self.unread(c)
                return False
            self._read = ""
            self.argue(_ESCAPES.get(c, c) if before is At.STRING else c)
        return True


def _string(value: str) -> str:
    try:
        found = json.loads(value)
    except ValueError:
        return ""
    return found if isinstance(found, str) else ""


def _object(value: str) -> str | None:
    """The text of an object: as it stands, or as some models have it within a string, or {} for null."""
    try:
        found = json.loads(value)
        if isinstance(found, str):
            value, found = found, json.loads(found)
    except (ValueError, RecursionError):
        return None
    return "{}" if found is None else value if isinstance(found, dict) else None
