"""pydantic-ai as its users call it: python pydantic_ai_run.py BASE_URL MODEL. Prints what it saw."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Annotated

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
SETTINGS = {"temperature": 0, "max_tokens": 80}


class City(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    inhabitants: Annotated[int, Field(ge=1, le=9)]


def main():
    seen = {}
    provider = OpenAIProvider(base_url=BASE_URL, api_key="none")
    for name, kind in (("chat", OpenAIChatModel), ("responses", OpenAIResponsesModel)):
        model = kind(MODEL, provider=provider)
        for output, wanted in (("tool", City), ("native", NativeOutput(City))):
            agent = Agent(model, output_type=wanted, model_settings=SETTINGS, retries=2)
            try:
                done = agent.run_sync("A city, with inhabitants in millions.")
                text = Agent(model, model_settings={"temperature": 0, "max_tokens": 8})
                again = text.run_sync("And another?", message_history=done.all_messages())
                seen[f"{name} {output}"] = [done.output.inhabitants, again.output]
            except Exception as error:
                seen[f"{name} {output}"] = [type(error).__name__, str(error)[-600:]]
    try:
        seen["refused"] = Agent(model, model_settings={"max_tokens": 1_000_000}).run_sync("Hi").output
    except Exception as error:
        seen["refused"] = type(error).__name__
    print(json.dumps({"version": version("pydantic-ai-slim"), **seen}))


main()
