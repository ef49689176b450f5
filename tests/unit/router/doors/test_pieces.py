"""Large answers, written in many calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic_core import to_json

from router.doors.http.logprobs import Entry, chat_logprobs
from router.doors.http.pieces import AT_ONCE, json_of, pieces

NAMES: Any = SimpleNamespace(bytes_of=lambda token_id: b"%d" % token_id)
TOP = [SimpleNamespace(token_id=t, logprob=-1.5) for t in range(20)]
LOGPROBS = chat_logprobs([Entry(1, SimpleNamespace(logprob=-0.5, top=TOP))] * (3 * AT_ONCE + 1), NAMES)
ROWS = [None, *({str(i): {"logprob": -1.0, "rank": i}} for i in range(2 * AT_ONCE))]
COLUMNS = {"tokens": ["a"] * 200, "token_logprobs": [-1.0] * 200, "top_logprobs": [{}] * 200, "text_offset": [0] * 200}
MESSAGE = {"role": "assistant", "content": 'Grüße "\u2028"', "refusal": None}
PART = {"type": "output_text", "text": "", "logprobs": LOGPROBS["content"]}
ANSWERS: dict[str, dict[str, Any]] = {
    "chat": {
        "id": 'a"b',
        "choices": [{"index": i, "message": MESSAGE, "logprobs": LOGPROBS} for i in range(3)],
        "prompt_logprobs": ROWS,
        "usage": {"prompt_tokens": 3},
    },
    "completion": {"choices": [{"text": "ü", "logprobs": COLUMNS, "prompt_logprobs": ROWS}]},
    "response": {"output": [{"type": "message", "content": [PART]}], "text": {"format": {"type": "text"}}},
    "small": {"choices": [{"logprobs": None, "message": {"content": None}}], "output": [], "content": {}, "tokens": []},
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_whole_is_what_one_call_writes(answer: str) -> None:
    assert json_of(ANSWERS[answer]) == to_json(ANSWERS[answer])


@pytest.mark.parametrize("answer", ANSWERS)
def test_no_piece_has_more_than_a_few_elements(answer: str) -> None:
    most = len(to_json(LOGPROBS["content"][:AT_ONCE]))
    assert max(map(len, pieces(ANSWERS[answer]))) <= most
