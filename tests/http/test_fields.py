"""No field of a request is dropped in silence, and docs/api.md says what becomes of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from router.doors.http.chat import ChatRequest
from router.doors.http.completions import CompletionRequest
from router.doors.http.errors import ApiError
from router.doors.http.fields import CHAT, COMPLETIONS, RESPONSES, Fields, Treatment, refuse_fields, written_into
from router.doors.http.responses import ResponseRequest

API = Path(__file__).resolve().parents[2] / "docs" / "api.md"
TABLES: Any = [
    (CHAT, ChatRequest, chat_create_params.CompletionCreateParamsBase),
    (COMPLETIONS, CompletionRequest, completion_create_params.CompletionCreateParamsBase),
    (RESPONSES, ResponseRequest, response_create_params.ResponseCreateParamsBase),
]


@pytest.mark.parametrize(("fields", "body", "params"), TABLES)
def test_every_field_of_the_openai_package_has_a_row(fields: Fields, body: Any, params: Any) -> None:
    known = set(params.__annotations__) | {"stream"}
    assert known <= set(fields), f"docs/api.md has no row for {known - set(fields)}"


@pytest.mark.parametrize(("fields", "body", "params"), TABLES)
def test_rows_and_parsing_agree(fields: Fields, body: Any, params: Any) -> None:
    taken = {name for name, field in fields.items() if field.treatment is not Treatment.REFUSED}
    assert taken == set(body.model_fields)


def test_the_document_is_what_the_tables_say() -> None:
    assert written_into(API.read_text()) == API.read_text(), "run python -m router.doors.http.fields"


def test_refused_fields_may_ask_for_nothing() -> None:
    assert refuse_fields({"store": False, "audio": None, "n": 2}, CHAT) == {"n": 2}
    for value in (True, 0, "false"):
        with pytest.raises(ApiError, match="store is not supported: nothing is stored"):
            refuse_fields({"store": value}, CHAT)
