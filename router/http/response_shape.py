"""A response as JSON: whole, and as the numbered events of a stream.

created ─ in_progress ─ for each item: output_item.added ... output_item.done ─ completed | incomplete | failed
    a message    content_part.added ─ output_text.delta* ─ output_text.done ─ content_part.done
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from pydantic_core import to_json

from router.http.answer import Choice
from router.http.errors import ApiError
from router.http.logprobs import Entry, TokenNames, chat_logprobs
from router.http.shapes import usage_of
from router.lifecycle import Finish


class ResponseShape:
    def __init__(
        self,
        request_id: str,
        model: str,
        names: TokenNames | None,
        *,
        echoed: dict[str, Any],
        params: dict[str, str],
    ) -> None:
        """`names`: None without logprobs. `echoed`: what a response repeats of its request."""
        self.params = params
        self._id = f"resp_{request_id}"
        self._item = f"msg_{request_id}"
        self._model = model
        self._created = int(time.time())
        self._names = names
        self._echoed = echoed
        self._number = 0
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._delta_head = (
            f'"type":"response.output_text.delta","item_id":{quoted(self._item)},"output_index":0,"content_index":0,'
        )

    # A stream.

    def delta(self, choice: Choice, text: str, entries: list[Entry]) -> str:
        opening = ""
        if not choice.begun:
            choice.begun = True
            opening = self._opening()
        if not text and not entries:
            return opening
        self._texts.append(text)
        logprobs = self._taken(entries)
        said = to_json(logprobs).decode() if logprobs else "[]"
        number, self._number = self._number, self._number + 1
        return (
            f'{opening}event: response.output_text.delta\ndata: {{{self._delta_head}"sequence_number":{number},'
            f'"delta":{quoted(text)},"logprobs":{said}}}\n\n'
        )

    def finish(self, choice: Choice) -> str:
        text = "".join(self._texts)
        part, where = self._part(text), {"item_id": self._item, "output_index": 0, "content_index": 0}
        item = self._message(text, self._status(choice))
        return "".join(
            (
                self._event("response.output_text.done", **where, text=text, logprobs=self._logprobs),
                self._event("response.content_part.done", **where, part=part),
                self._event("response.output_item.done", output_index=0, item=item),
            )
        )

    def end(self, choices: Sequence[Choice]) -> str:
        (choice,) = choices
        status = self._status(choice)
        return self._event(f"response.{status}", response=self._response(choice, status, "".join(self._texts)))

    def error(self, error: ApiError) -> str:
        response = self._response(None, "failed", "".join(self._texts))
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=response)

    def _opening(self) -> str:
        empty = self._response(None, "in_progress", None)
        return "".join(
            (
                self._event("response.created", response=empty),
                self._event("response.in_progress", response=empty),
                self._event(
                    "response.output_item.added",
                    output_index=0,
                    item={**self._message("", "in_progress"), "content": []},
                ),
                self._event(
                    "response.content_part.added",
                    item_id=self._item,
                    output_index=0,
                    content_index=0,
                    part=self._part(""),
                ),
            )
        )

    def _event(self, kind: str, **fields: Any) -> str:
        number, self._number = self._number, self._number + 1
        data = to_json({"type": kind, "sequence_number": number, **fields}).decode()
        return f"event: {kind}\ndata: {data}\n\n"

    # Whole.

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        (choice,) = choices
        text, entries = choice.take()
        self._taken(entries)
        return self._response(choice, self._status(choice), text)

    def _response(self, choice: Choice | None, status: str, text: str | None) -> dict[str, Any]:
        """`choice`: None before the end. `text`: None before there is any output."""
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._model,
            "output": [] if text is None else [self._message(text, "incomplete" if status != "completed" else status)],
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

    def _message(self, text: str, status: str) -> dict[str, Any]:
        content = [self._part(text)]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _taken(self, entries: list[Entry]) -> list[dict[str, Any]]:
        if not entries or self._names is None:
            return []
        logprobs = chat_logprobs(entries, self._names)["content"]
        self._logprobs += logprobs
        return logprobs

    @staticmethod
    def _status(choice: Choice) -> str:
        return "completed" if choice.reason is Finish.STOP else "incomplete"
