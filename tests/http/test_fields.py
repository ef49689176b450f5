"""No field of a request is dropped in silence, and docs/api.md says what becomes of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params, response_includable, tool_param

from router.doors.http.chat import ChatRequest
from router.doors.http.completions import CompletionRequest
from router.doors.http.errors import ApiError
from router.doors.http.fields import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    RESPONSES,
    TOKENIZE,
    Fields,
    Treatment,
    refuse_fields,
    written_into,
)
from router.doors.http.response_input import OTHER_TOOLS
from router.doors.http.responses import INCLUDED, LOGPROBS, ResponseRequest
from router.doors.http.text import DetokenizeRequest, TokenizeRequest

VLLM: dict[str, Any] = json.loads(Path(__file__).with_name("vllm_fields.json").read_text())
BY_TITLE = {
    "chat": CHAT,
    "completions": COMPLETIONS,
    "responses": RESPONSES,
    "tokenize": TOKENIZE,
    "detokenize": DETOKENIZE,
}
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


def literals(kind: Any) -> set[str]:
    """All strings that a type of the `openai` package allows, of a union of dictionaries those of `type`."""
    if get_origin(kind) is Literal:
        return set(get_args(kind))
    if hasattr(kind, "__required_keys__"):
        return literals(get_type_hints(kind)["type"])
    return {name for part in get_args(kind) for name in literals(part)}


def test_every_tool_and_every_part_of_the_openai_package_is_known() -> None:
    assert literals(tool_param.ToolParam) == OTHER_TOOLS | {"function"}
    assert literals(response_includable.ResponseIncludable) == {*INCLUDED, LOGPROBS}


@pytest.mark.parametrize("title", BY_TITLE)
def test_every_field_of_vllm_has_a_row_and_its_default_is_taken(title: str) -> None:
    """The file is of the version that docs/api.md names; vllm_fields.py writes it anew."""
    assert f"vLLM {VLLM['version']}" in API.read_text()
    fields, theirs = BY_TITLE[title], VLLM[title]
    assert set(theirs) <= set(fields), f"docs/api.md has no row for {set(theirs) - set(fields)}"
    for name, defaults in theirs.items():
        if (title, name) == ("responses", "store"):  # theirs stores only where it is told to, and says true
            continue
        for default in defaults:
            refuse_fields({name: default}, fields)


def test_what_is_called_vllms_is() -> None:
    everything = {name for title in BY_TITLE for name in VLLM[title]}
    for title, fields in BY_TITLE.items():
        claimed = {name for name, field in fields.items() if field.note.startswith("vLLM's")}
        assert claimed <= everything, f"{title}: vLLM has no {claimed - everything}"


@pytest.mark.parametrize(
    ("fields", "body", "params"),
    [*TABLES, (TOKENIZE, TokenizeRequest, None), (DETOKENIZE, DetokenizeRequest, None)],
)
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
