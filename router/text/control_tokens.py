"""What a client writes in a chat is text, also where it spells a control token: a turn is what the template makes.

    marked    a client's texts in which a control token is spelt, or begun at the end: a mark inside breaks the spelling
    rendered  by the template, which adds its own control tokens
    encoded   by a copy of the tokenizer that knows no control tokens, but a twin for each that the template wrote;
              marks are taken out before, twins become what they stand for after: one pass, so that all the rest is
              exactly what the tokenizer itself makes of the rendered text

Chats that spell none, nearly all, are rendered and encoded as they are.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from router.text.chat import Chat, ChatMessage, ToolCall
from router.text.encode import encode

_END = ""  # in a trie: here a token ends


class ControlTokens:
    """Those of one tokenizer. Thread-safe."""

    def __init__(self, backend: Any) -> None:
        """`backend`: a tokenizers.Tokenizer. The copy is made when it is first needed: it may take a second."""
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._tokens = {t.content: (token_id, t) for token_id, t in added.items() if t.special and len(t.content) > 1}
        self._ids = frozenset(token_id for token_id, _ in self._tokens.values())
        spellings = trie_pattern(self._tokens)
        self._spelt = re.compile(spellings) if self._tokens else None
        self._spelt_somehow = re.compile(spellings, re.IGNORECASE) if self._tokens else None
        self._begun = {t[:n].lower() for t in self._tokens for n in range(1, len(t))}
        firsts = "".join(sorted({re.escape(c) for t in self._tokens for c in (t[0].lower(), t[0].upper())}))
        self._may_begin = re.compile(f"[{firsts}]").search if self._tokens else None
        self._longest = max((len(t) for t in self._tokens), default=0)
        self._mark = f"x{secrets.token_hex(8)}x"  # of letters: a template may write it as JSON
        self._lock = threading.Lock()
        self._plain: Any = None
        self._names: dict[str, str] = {}  # a token -> its twin's
        self._twins: dict[int | None, int] = {}  # a twin's id -> the token's
        self._guard = ""
        self._guard_id: int | None = None

    @property
    def ready(self) -> bool:
        return self._plain is not None

    # Marks.

    def marked(self, chat: Chat) -> Chat:
        """The same object if nothing in it spells a control token."""
        may_begin = self._may_begin
        if may_begin is None:
            return chat
        texts = [chat.tools_json, chat.template_kwargs_json]
        for m in chat.messages:
            texts += m.texts if m.tool_calls else (m.content, m.role, m.name, m.tool_call_id)
        if not any(map(may_begin, texts)) and not any("\\" in text for text in texts if text[:1] in ("{", "[")):
            return chat  # nearly all
        messages = [self._marked_message(m) for m in chat.messages]
        tools, variables = self._marked_json(chat.tools_json), self._marked_json(chat.template_kwargs_json)
        same = tools is chat.tools_json and variables is chat.template_kwargs_json
        if same and all(marked is m for marked, m in zip(messages, chat.messages, strict=True)):
            return chat
        return replace(chat, messages=messages, tools_json=tools, template_kwargs_json=variables)

    def without_marks(self, text: str) -> str:
        return text.replace(self._mark, "")

    def _marked_message(self, m: ChatMessage) -> ChatMessage:
        mark = self.marked_text
        calls = tuple(ToolCall(mark(c.id), mark(c.name), self._marked_json(c.arguments_json)) for c in m.tool_calls)
        marked = ChatMessage(mark(m.role), mark(m.content), mark(m.name), calls, mark(m.tool_call_id))
        return m if all(a is b for a, b in zip(marked.texts, m.texts, strict=True)) else marked

    def _marked_json(self, text: str) -> str:
        """Of JSON, or of what should have been. As it was written, unless escapes hide a token."""
        marked = self.marked_text(text)
        if "\\u" not in text and "\\/" not in text:
            return marked
        try:
            value = json.loads(text)
            meant = self._marked_value(value)
            return marked if json.loads(marked) == meant else json.dumps(meant, ensure_ascii=False)
        except (ValueError, RecursionError):
            return marked  # it will be refused, or be text

    def _marked_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.marked_text(value)
        if isinstance(value, list):
            return [self._marked_value(v) for v in value]
        if isinstance(value, dict):
            return {self.marked_text(k): self._marked_value(v) for k, v in value.items()}
        return value

    def marked_text(self, text: str) -> str:
        """The same object if there is nothing to mark."""
        if self._spelt_somehow is None or self._may_begin is None or not self._may_begin(text):
            return text
        while self._spelt_somehow.search(text):  # again: one may begin within another
            text = self._spelt_somehow.sub(lambda found: f"{found[0][0]}{self._mark}{found[0][1:]}", text)
        tail = text[1 - self._longest :].lower()
        for at in range(len(tail)):
            if tail[at:] in self._begun:  # and may go on with the next text
                split = len(text) - len(tail) + at + 1
                return f"{text[:split]}{self._mark}{text[split:]}"
        return text

    # Encoding.

    def encode(self, rendered: str, add_special_tokens: bool) -> list[int]:
        """Of a rendered chat that was marked."""
        assert self._spelt is not None
        plain = self._copy()
        named = self._spelt.sub(self._named, rendered)
        text = self.without_marks(named)
        ids: list[int] = encode(plain, text, add_special_tokens=False)
        if self._ids.intersection(ids):  # the vocabulary itself has them (Unigram): only a cut keeps them apart
            text = named.replace(self._mark, self._guard)
            ids = encode(plain, text, add_special_tokens=False)
        if add_special_tokens:
            ids = encode(plain, text, add_special_tokens=True)
        return [self._twins.get(t, t) for t in ids if t != self._guard_id]

    def _named(self, found: re.Match[str]) -> str:
        token, start, end = found[0], found.start(), found.end()
        around = found.string[max(0, start - 1) : start] + found.string[end : end + 1]
        if self._tokens[token][1].single_word and re.search(r"\w", around):
            return token  # there it is text for the tokenizer, too
        return self._names[token]

    def _copy(self) -> Any:
        from tokenizers import AddedToken, Tokenizer

        with self._lock:
            if self._plain is None:
                plain = Tokenizer.from_str(self._backend.to_str())
                plain.no_truncation()
                plain.no_padding()
                plain.encode_special_tokens = True
                secret = secrets.token_hex(8)
                self._names = {content: f"\uf8ff{secret}.{i}\uf8ff" for content, (i, _) in self._tokens.items()}
                self._guard = f"\uf8ff{secret}\uf8ff"
                twins = [
                    AddedToken(
                        self._names[content],
                        single_word=t.single_word,
                        lstrip=t.lstrip,
                        rstrip=t.rstrip,
                        normalized=t.normalized,
                        special=False,
                    )
                    for content, (_, t) in self._tokens.items()
                ]
                plain.add_tokens([*twins, AddedToken(self._guard, normalized=False, special=False)])
                self._twins = {plain.token_to_id(self._names[c]): i for c, (i, _) in self._tokens.items()}
                self._guard_id = plain.token_to_id(self._guard)
                self._plain = plain
            return self._plain


def trie_pattern(words: Iterable[str]) -> str:
    """Finds the longest of the words, in a time that does not depend on how many there are."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for c in word:
            node = node.setdefault(c, {})
        node[_END] = {}
    return _pattern_of(root)


def _pattern_of(node: dict[str, Any]) -> str:
    prefix = ""
    while len(node) == 1 and _END not in node:  # a run without branches: no nesting
        ((c, node),) = node.items()
        prefix += re.escape(c)
    branches = [re.escape(c) + _pattern_of(below) for c, below in sorted(node.items()) if c != _END]
    if not branches:
        return prefix
    rest = f"(?:{'|'.join(branches)})"
    return f"{prefix}{rest}{'?' if _END in node else ''}"
