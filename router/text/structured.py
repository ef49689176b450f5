"""Checks `structured` before any work: what would not compile on a worker is refused by the router.

A verdict takes milliseconds, and for the largest grammars hundreds: it is found on a thread, and remembered.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from grammar.place import place_of
from grammar.structured import Kind, Structured, StructuredError, check, parse_schema
from grammar.threads import deep_threads
from router.errors import Code, RequestRefused, refuse

_REMEMBERED_BYTES = 8 << 20
_CHECK_S = 5.0
_TOO_LONG = f"checking it takes more than {_CHECK_S:g} s; simplify it"


class StructuredChecker:
    """`build_tokenizer` makes the LLTokenizer that knows the names of special tokens; called once, on the thread."""

    def __init__(self, build_tokenizer: Callable[[], Any]) -> None:
        self._build_tokenizer = build_tokenizer
        self._tokenizer: Any = None
        self._verdicts: OrderedDict[Structured, str] = OrderedDict()  # "" = usable; least recently asked first
        self._bytes = 0
        self._threads = deep_threads(1, "grammar")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def check(self, structured: Structured) -> None:
        """Raises RequestRefused. `check_size` came before."""
        verdict = await self.verdict(structured)
        if verdict:
            raise structured_refused(structured, verdict)

    async def verdict(self, structured: Structured) -> str:
        """Why it cannot be used; "" if it can. Raises RequestRefused where that takes too long to say."""
        verdict = self._verdicts.get(structured)
        if verdict is None:
            work = self._threads.submit(self._find, structured)
            try:
                async with asyncio.timeout(_CHECK_S):
                    verdict = await asyncio.wrap_future(work)
            except TimeoutError:
                begun = not work.cancelled()
                if begun:  # its price is paid once, not at every request
                    self._remember(structured, _TOO_LONG)
                raise self._late(structured, begun) from None
            self._remember(structured, verdict)
        else:
            self._verdicts.move_to_end(structured)
        return verdict

    @staticmethod
    def _late(structured: Structured, begun: bool) -> RequestRefused:
        """A check that waited for others says nothing about the format."""
        if begun:
            return structured_refused(structured, _TOO_LONG)
        why = "many formats wait to be checked; retry later, or send formats that were used before"
        return refuse(Code.RESOURCE_EXHAUSTED, why, field="structured", retry_after_ms=1000)

    def _find(self, structured: Structured) -> str:
        if structured.kind is Kind.LARK and self._tokenizer is None:
            self._tokenizer = self._build_tokenizer()
        try:
            check(structured, self._tokenizer if structured.kind is Kind.LARK else None)
        except StructuredError as error:
            return _placed(structured, str(error) or "no reason was given")
        return ""

    def _remember(self, structured: Structured, verdict: str) -> None:
        if structured in self._verdicts:
            return
        self._verdicts[structured] = verdict
        self._bytes += structured.size_bytes
        while self._bytes > _REMEMBERED_BYTES:
            forgotten, _ = self._verdicts.popitem(last=False)
            self._bytes -= forgotten.size_bytes


def _placed(structured: Structured, error: str) -> str:
    """With the keyword's place in front, where a schema's error names a keyword."""
    if structured.kind is not Kind.JSON_SCHEMA:
        return error
    try:
        place = place_of(parse_schema(structured.text), error)
    except StructuredError:  # it is not even a schema, which the error says already
        return error
    return f"{place}: {error}" if place else error


def structured_refused(structured: Structured, error: object) -> RequestRefused:
    fix = "" if "; " in str(error) else "; correct it, or leave it out"
    why = f"the {structured.kind.value} of `structured` cannot be used: {error}{fix}"
    return refuse(Code.INVALID_ARGUMENT, why, field="structured")
