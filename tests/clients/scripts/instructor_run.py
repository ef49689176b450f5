"""instructor as its users call it: python instructor_run.py BASE_URL MODEL. Prints what it saw."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import instructor
import openai
from pydantic import BaseModel, ConfigDict, Field

BASE_URL, MODEL = sys.argv[1], sys.argv[2]


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else a small model goes on with names of its own
    name: str = Field(max_length=20)
    inhabitants: int = Field(ge=1, le=9)


def main():
    seen = {}
    for mode in ("TOOLS", "JSON_SCHEMA", "JSON"):
        client = instructor.from_openai(
            openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0), mode=instructor.Mode[mode]
        )
        try:
            city = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "A city, with inhabitants in millions."}],
                response_model=City,
                max_retries=1,
                max_tokens=100,
                temperature=0,
            )
            seen[mode] = city.model_dump()
        except Exception as error:
            seen[mode] = [type(error).__name__, str(error)[-600:]]
    print(json.dumps({"version": version("instructor"), **seen}))


main()
