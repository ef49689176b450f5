"""A response as JSON: whole, and as the numbered events of a stream.

created ─ in_progress ─ for each item: output_item.added ... output_item.done ─ completed | incomplete | failed
    a message    content_part.added ─ output_text.delta* ─ output_text.done ─ content_part.done
    a call       function_call_arguments.delta* ─ function_call_arguments.done
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from pydantic_core import to_json

from router.doors.http.answer import Choice
from router.doors.http.errors import ApiError
from router.doors.http.logprobs import Entry, TokenNames, chat_logprobs
from router.doors.http.shapes import usage_of
from router.doors.http.tools import Reader, new_call_id
from router.request import Finish
from router.text.tools.events import CallArguments, CallStart, Text, ToolEvent


class ResponseShape:
    repeats = 4  # in output_text.done, content_part.done, output_item.done and completed

    def __init__(
        self,
        request_id: str,
        model: str,
        names: TokenNames | None,
        *,
        echoed: dict[str, Any],
        params: dict[str, str],
        reader: Callable[[], Reader] | None = None,
    ) -> None:
        """`names`: None without logprobs. `echoed`: what a response repeats of its request. `reader`: of tool calls."""
        self.params = params
        self._request_id = request_id
        self._id = f"resp_{request_id}"
        self._model = model
        self._created = int(time.time())
        self._names = names
        self._echoed = echoed
        self._reader = reader() if reader is not None else None
        self._entries: list[Entry] = []  # of text that may yet become a call
        self._number = 0  # of the next event
        self._whole = False  # no stream: events are not written
        self._items: list[_Item] = []  # all but the last are done

    # A stream.

    def delta(self, choice: Choice, text: str, entries: list[Entry]) -> str:
        said = []
        if not choice.begun:
            choice.begun = True
            begun = self._response(None, "in_progress")
            said = [
                self._event("response.created", response=begun),
                self._event("response.in_progress", response=begun),
            ]
        if self._reader is None:
            if text or entries:
                said.append(self._text(text, entries))
        else:
            self._entries += entries
            said += [self._said(event) for event in self._reader.push(text)]
        return "".join(said)

    def finish(self, choice: Choice) -> str:
        said = [self._said(event) for event in self._reader.finish()] if self._reader is not None else []
        if self._entries and not (self._items and self._items[-1].kind == "function_call"):
            entries, self._entries = self._entries, []
            said.append(self._text("", entries))
        if not self._items:
            said.append(self._open(_Item("message", f"msg_{self._request_id}")))
        return "".join((*said, self._close(self._status(choice))))

    def end(self, choices: Sequence[Choice]) -> str:
        (choice,) = choices
        status = self._status(choice)
        return self._event(f"response.{status}", response=self._response(choice, status))

    def error(self, error: ApiError) -> str:
        response = self._response(None, "failed")
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=response)

    def _said(self, event: ToolEvent) -> str:
        """The tokens' logprobs come with the text that they became; a call has none."""
        match event:
            case Text(text):
                entries, self._entries = self._entries, []
                return self._text(text, entries)
            case CallStart(_, name):
                self._entries = []
                item = _Item("function_call", f"fc_{self._request_id}_{len(self._items)}", name, new_call_id())
                return self._close("completed") + self._open(item)
            case CallArguments(_, text):
                item = self._items[-1]
                item.texts.append(text)
                self._entries = []
                return self._event("response.function_call_arguments.delta", **self._where(), delta=text)

    def _text(self, text: str, entries: list[Entry]) -> str:
        opening = ""
        if not self._items or self._items[-1].kind != "message":
            number = f"_{len(self._items)}" if self._items else ""
            opening = self._close("completed") + self._open(_Item("message", f"msg_{self._request_id}{number}"))
        item = self._items[-1]
        item.texts.append(text)
        logprobs = self._taken(item, entries)
        if self._whole:
            return ""
        said = to_json(logprobs).decode() if logprobs else "[]"
        number, self._number = self._number, self._number + 1
        return (
            f'{opening}event: response.output_text.delta\ndata: {{"type":"response.output_text.delta",'
            f'"content_index":0,"item_id":{quoted(item.id)},"output_index":{len(self._items) - 1},'
            f'"sequence_number":{number},"delta":{quoted(text)},"logprobs":{said}}}\n\n'
        )

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._items[-1].id, "output_index": len(self._items) - 1}

    def _open(self, item: _Item) -> str:
        self._items.append(item)
        shown = item.content("in_progress")
        if item.kind == "function_call":
            return self._event("response.output_item.added", output_index=len(self._items) - 1, item=shown)
        added = {**shown, "content": []}
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=added) + self._event(
            "response.content_part.added", **self._where(), content_index=0, part=item.part()
        )

    def _close(self, status: str) -> str:
        """The last item, if there is one."""
        if not self._items:
            return ""
        item = self._items[-1]
        if item.kind == "function_call":
            done = self._event(
                "response.function_call_arguments.done", **self._where(), name=item.name, arguments=item.text
            )
        else:
            where = {**self._where(), "content_index": 0}
            done = self._event("response.output_text.done", **where, text=item.text, logprobs=item.logprobs)
            done += self._event("response.content_part.done", **where, part=item.part())
        item.status = status
        index = len(self._items) - 1
        return done + self._event("response.output_item.done", output_index=index, item=item.content(status))

    def _event(self, kind: str, **fields: Any) -> str:
        if self._whole:
            return ""
        number, self._number = self._number, self._number + 1
        data = to_json({"type": kind, "sequence_number": number, **fields}).decode()
        return f"event: {kind}\ndata: {data}\n\n"

    # Whole.

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What a stream would have said last."""
        (choice,) = choices
        self._whole = True
        self.delta(choice, *choice.take())
        self.finish(choice)
        return self._response(choice, self._status(choice))

    def _response(self, choice: Choice | None, status: str) -> dict[str, Any]:
        """`choice`: None before the end."""
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._model,
            "output": [item.content(item.status) for item in self._items],
            "usage": None if choice is None else self._usage(choice),
            **self._echoed,
            "background": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "truncation": "disabled",
        }

    @staticmethod
    def _usage(choice: Choice) -> dict[str, Any]:
        usage = usage_of([choice], 1)
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    def _taken(self, item: _Item, entries: list[Entry]) -> list[dict[str, Any]]:
        if not entries or self._names is None:
            return []
        logprobs = chat_logprobs(entries, self._names)["content"]
        item.logprobs += logprobs
        return logprobs

    @staticmethod
    def _status(choice: Choice) -> str:
        return "completed" if choice.reason is Finish.STOP else "incomplete"


@dataclass(slots=True)
class _Item:
    """Of the output: a message, or a call of a function."""

    kind: str
    id: str
    name: str = ""
    call_id: str = ""
    status: str = "incomplete"
    texts: list[str] = field(default_factory=list)  # what is said, or the arguments
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def content(self, status: str) -> dict[str, Any]:
        common = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return {**common, "call_id": self.call_id, "name": self.name, "arguments": self.text}
        return {**common, "role": "assistant", "content": [self.part()]}
