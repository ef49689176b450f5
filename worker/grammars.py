"""Compiled grammars of one worker: found at once, or compiled on a thread and heard of by message.

The engine thread asks (`find`) and is told (`keep`, when GrammarCompiled arrives); it alone touches what is remembered.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

from engine.grammar import Grammar, GrammarCompiler
from grammar.structured import Structured, StructuredError
from grammar.threads import deep_threads
from worker.messages import GrammarCompiled

log = logging.getLogger(__name__)

_REMEMBERED = 256
_REMEMBERED_BYTES = 8 << 20  # of text; compiled, a grammar is some times its text


class CompiledGrammars:
    """`post` reaches the engine thread."""

    def __init__(self, compiler: GrammarCompiler, post: Callable[[GrammarCompiled], None]) -> None:
        self._compiler = compiler
        self._post = post
        self._compiled: OrderedDict[Structured, Grammar] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._under_way: set[Structured] = set()
        self._threads = deep_threads(1, "grammar")

    def prepare(self) -> None:
        """Loads the tokenizer in the background."""
        self._threads.submit(self._prepare)

    def _prepare(self) -> None:
        try:
            self._compiler.prepare()
        except Exception as error:
            log.warning("structured output is not available: %s", error)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def find(self, structured: Structured) -> Grammar | None:
        """None: it is being compiled, and GrammarCompiled follows."""
        grammar = self._compiled.get(structured)
        if grammar is not None:
            self._compiled.move_to_end(structured)
        elif structured not in self._under_way:
            self._under_way.add(structured)
            self._threads.submit(self._compile, structured)
        return grammar

    def _compile(self, structured: Structured) -> None:
        try:
            self._post(GrammarCompiled(structured, self._compiler.compile(structured)))
        except StructuredError as error:
            self._post(GrammarCompiled(structured, None, str(error) or "no reason was given"))
        except Exception as error:
            log.exception("a grammar could not be compiled")
            self._post(GrammarCompiled(structured, None, f"the worker failed on it ({type(error).__name__})"))

    def keep(self, compiled: GrammarCompiled) -> None:
        self._under_way.discard(compiled.structured)
        if compiled.grammar is None:
            return
        self._compiled[compiled.structured] = compiled.grammar
        self._bytes += compiled.structured.size_bytes
        while len(self._compiled) > _REMEMBERED or self._bytes > _REMEMBERED_BYTES:
            forgotten, _ = self._compiled.popitem(last=False)
            self._bytes -= forgotten.size_bytes
