"""The OpenAI Agents SDK as its users call it: python agents_run.py BASE_URL MODEL. Prints what it saw."""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.metadata import version
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
CALLED = []


@function_tool
def weather(city: Literal["Bern", "Rome"]) -> str:
    """The weather in a city."""
    CALLED.append(city)
    return "sunny"


async def run(kind):
    async with AsyncOpenAI(base_url=BASE_URL, api_key="none", max_retries=0) as client:
        # Over /v1/responses it takes an answer that max_tokens cut for a failure: so the answer ends at a full stop.
        short = {"temperature": 0, "max_tokens": 200, "extra_body": {"stop": ["."]}}
        settings = ModelSettings(tool_choice="required", parallel_tool_calls=False, **short)
        agent = Agent(
            name="Brief",
            instructions="You are brief.",
            model=kind(MODEL, client),
            tools=[weather],
            model_settings=settings,
        )
        CALLED.clear()
        done = await Runner.run(agent, "What is the weather in Bern?")
        kinds = [type(item).__name__ for item in done.new_items]
        first = {"calls": len(CALLED), "kinds": kinds, "said": done.final_output}
        agent.tools, agent.model_settings = [], ModelSettings(**short)
        again = Runner.run_streamed(agent, [*done.to_input_list(), {"role": "user", "content": "And in Rome?"}])
        pieces = [e async for e in again.stream_events() if e.type == "raw_response_event"]
        return {**first, "events": len(pieces), "again": again.final_output}


async def cut():
    """What it makes of an answer that max_tokens ends."""
    async with AsyncOpenAI(base_url=BASE_URL, api_key="none", max_retries=0) as client:
        settings = ModelSettings(temperature=0, max_tokens=4)
        agent = Agent(name="Brief", model=OpenAIResponsesModel(MODEL, client), model_settings=settings)
        try:
            return (await Runner.run(agent, "Why is the sky blue?")).final_output
        except Exception as error:
            return f"{type(error).__name__}: {error}"


async def main():
    set_tracing_disabled(True)
    chat, responses = await run(OpenAIChatCompletionsModel), await run(OpenAIResponsesModel)
    print(json.dumps({"version": version("openai-agents"), "chat": chat, "responses": responses, "cut": await cut()}))


asyncio.run(main())
