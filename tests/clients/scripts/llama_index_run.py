"""LlamaIndex as its users call it: python llama_index_run.py BASE_URL MODEL. Prints what it saw."""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.metadata import version

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from openai import BadRequestError
from pydantic import BaseModel, ConfigDict, Field

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
MESSAGES = [ChatMessage(role="user", content="Why is the sky blue?")]


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=20)
    inhabitants: int = Field(ge=1, le=9)


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def llm(**more):
    known = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 8192, "max_retries": 0}
    fields = {"model": MODEL, "api_base": BASE_URL, "api_key": "none", "temperature": 0, "max_tokens": 16}
    return OpenAILike(**{**known, **fields, **more})


def main():
    chat = llm()
    whole = chat.chat(MESSAGES)
    history = [*MESSAGES, whole.message, ChatMessage(role="user", content="And red?")]
    tool = FunctionTool.from_defaults(weather)
    called = llm(max_tokens=80).chat_with_tools(
        [tool], "What is the weather in Bern?", tool_required=True, allow_parallel_tool_calls=False
    )
    calls = llm().get_tool_calls_from_response(called)
    said = tool.call(**calls[0].tool_kwargs)
    answered = ChatMessage(role="tool", content=str(said), additional_kwargs={"tool_call_id": calls[0].tool_id})
    asked = ChatMessage(role="user", content="What is the weather in Bern?")
    after = llm().chat([asked, called.message, answered])
    structured = llm(max_tokens=80, should_use_structured_outputs=True).as_structured_llm(City)
    try:
        llm(max_tokens=1_000_000).chat(MESSAGES)
        refused = None
    except BadRequestError as error:
        refused = error.code
    print(
        json.dumps(
            {
                "version": version("llama-index-llms-openai-like"),
                "whole": whole.message.content,
                "usage": whole.raw.usage.completion_tokens,
                "pieces": [piece.delta for piece in chat.stream_chat(MESSAGES)],
                "async": asyncio.run(chat.achat(MESSAGES)).message.content,
                "again": chat.chat(history).message.content,
                "text": llm(is_chat_model=False).complete("Once upon a time").text,
                "calls": [[call.tool_name, call.tool_kwargs] for call in calls],
                "after": after.message.content,
                "structured": structured.chat([ChatMessage(role="user", content="A city.")]).raw.model_dump(),
                "refused": refused,
            }
        )
    )


main()
