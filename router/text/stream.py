"""Text out: one answer, as it comes.

Never half a character: text appears with the token that completes it. Text that may be the start of a stop string is
held back until it is certain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from router.text.tokenizer import Tokenizer


class TextStream:
    """One answer's text. `push` returns what became certain; `stopped` is set when a stop string is complete.

    `shown`: special tokens that are part of the text, by name; the others are silent. `ends`: tokens that end the
    answer, and are no part of its text even where they are ordinary ones. `include_stop`: what ends it is part of it.
    Without `skip_special`, every special token is shown by its name. `goes_on`: the prompt's text stands before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        min_tokens: int = 0,
        shown: Mapping[str, int] | None = None,
        ends: Iterable[int] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        goes_on: bool = False,
    ) -> None:
        self._characters = tokenizer.texts.stream(goes_on=goes_on)
        self._include_stop = include_stop
        if include_stop:
            ends = ()
        self._ends = frozenset(t for t in ends if not skip_special or tokenizer.texts.is_shown(t))
        self._stop = tuple(s for s in stop if s)
        self._longest = max((len(s) for s in self._stop), default=0)
        self._min_tokens = min_tokens
        names = {token_id: name for name, token_id in (shown or {}).items()}
        self._shown: Mapping[int, str] = names if skip_special else tokenizer.texts.special_names
        self._count = 0
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        self._count += 1
        if self._ends and token_id in self._ends and self._count > self._min_tokens:
            return ""
        piece = self._characters.push(token_id)
        if not piece:
            marker = self._shown.get(token_id)
            if marker is None:
                return ""
            piece = self._characters.mark(marker)
        return piece if not self._stop else self._scan(piece)

    def flush(self) -> str:
        """What is left at the end: held-back text, and bytes that never became a character."""
        if self.stopped:
            return ""
        rest = self._held + self._characters.flush()
        self._held = ""
        return rest

    def _scan(self, piece: str) -> str:
        text = self._held + piece
        if self._count > self._min_tokens:
            found = [(at, len(s)) for at, s in ((text.find(s), s) for s in self._stop) if at >= 0]
            if found:
                self.stopped = True
                self._held = ""
                at, length = min(found)
                return text[: at + length if self._include_stop else at]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_start(self, text: str) -> int:
        """Length of the longest tail that some stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return length
        return 0
