"""Follows one JSON object character by character: where it stands, whether it is still JSON, when it is over."""

from __future__ import annotations

import enum
import re

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_BLANK = " \t\n\r"
_MAX_DEPTH = 200


class At(enum.Enum):
    VALUE = enum.auto()  # a value is due
    FIRST = enum.auto()  # a value, or the end of the array
    KEY = enum.auto()
    FIRST_KEY = enum.auto()  # a key, or the end of the object
    COLON = enum.auto()
    STRING = enum.auto()
    ESCAPE = enum.auto()
    HEX = enum.auto()
    WORD = enum.auto()  # a number, true, false or null
    AFTER = enum.auto()  # a comma, or the end of what encloses
    DONE = enum.auto()
    BROKEN = enum.auto()


class JsonText:
    """Raw control characters within strings are let through: models write them, and they can be escaped."""

    def __init__(self) -> None:
        self.at = At.VALUE
        self.open: list[str] = []
        self._is_key = False
        self._word = ""
        self._hex = 0

    @property
    def depth(self) -> int:
        return len(self.open)

    def feed(self, c: str) -> At:
        """`at` after this character."""
        match self.at:
            case At.STRING:
                if c == "\\":
                    self.at = At.ESCAPE
                elif c == '"':
                    self.at = At.COLON if self._is_key else self._after()
            case At.ESCAPE:
                self._hex = 4
                self.at = At.HEX if c == "u" else At.STRING if c in '"\\/bfnrt' else At.BROKEN
            case At.HEX:
                self._hex -= 1
                if c not in "0123456789abcdefABCDEF":
                    self.at = At.BROKEN
                elif self._hex == 0:
                    self.at = At.STRING
            case At.WORD:
                self._in_word(c)
            case At.DONE | At.BROKEN:
                self.at = At.BROKEN
            case _:
                if c not in _BLANK:
                    self._between(c)
        return self.at

    def _between(self, c: str) -> None:
        at = self.at
        if at is At.COLON:
            self.at = At.VALUE if c == ":" else At.BROKEN
        elif at is At.AFTER:
            if c == ",":
                self.at = At.KEY if self.open[-1] == "{" else At.VALUE
            else:
                self._close(c)
        elif at in (At.KEY, At.FIRST_KEY):
            if c == '"':
                self.at, self._is_key = At.STRING, True
            elif at is At.FIRST_KEY:
                self._close(c)
            else:
                self.at = At.BROKEN
        elif c == '"':
            self.at, self._is_key = At.STRING, False
        elif c in "{[" and self.depth < _MAX_DEPTH:
            self.open.append(c)
            self.at = At.FIRST_KEY if c == "{" else At.FIRST
        elif c in "-0123456789tfn":
            self.at, self._word = At.WORD, c
        elif at is At.FIRST:
            self._close(c)
        else:
            self.at = At.BROKEN

    def _in_word(self, c: str) -> None:
        if c not in _BLANK and c not in ",]}":
            self._word += c
            if len(self._word) > 400:
                self.at = At.BROKEN
            return
        if self._word not in ("true", "false", "null") and not _NUMBER.fullmatch(self._word):
            self.at = At.BROKEN
            return
        self.at = self._after()
        if c not in _BLANK and self.at is At.AFTER:
            self._between(c)

    def _close(self, c: str) -> None:
        if self.open and c == {"{": "}", "[": "]"}[self.open[-1]]:
            self.open.pop()
            self.at = self._after()
        else:
            self.at = At.BROKEN

    def _after(self) -> At:
        return At.AFTER if self.open else At.DONE
