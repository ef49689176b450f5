"""litellm as its users call it: python litellm_chat.py BASE_URL MODEL. Prints what it saw."""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.metadata import version

import litellm

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
ASKED = {
    "model": f"openai/{MODEL}",
    "api_base": BASE_URL,
    "api_key": "none",
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    "max_tokens": 16,
    "temperature": 0,
}


def error_of(**changes):
    try:
        litellm.completion(**{**ASKED, **changes}, num_retries=0)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def main():
    whole = litellm.completion(**ASKED)
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ASKED, stream=True)]
    text = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=BASE_URL,
        api_key="none",
        prompt="Once upon a time",
        max_tokens=8,
        temperature=0,
    )
    print(
        json.dumps(
            {
                "version": version("litellm"),
                "whole": whole.choices[0].message.content,
                "usage": whole.usage.completion_tokens,
                "pieces": pieces,
                "async": asyncio.run(litellm.acompletion(**ASKED)).choices[0].message.content,
                "text": text.choices[0].text,
                "bad_model": error_of(model="openai/other"),
                "too_long": error_of(max_tokens=1_000_000),
                "bad_value": error_of(temperature=-1),
            }
        )
    )


main()
