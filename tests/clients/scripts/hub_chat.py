"""huggingface_hub's client as its users call it: python hub_chat.py BASE_URL MODEL. Prints what it saw."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

from huggingface_hub import InferenceClient

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]


def main():
    client = InferenceClient(base_url=BASE_URL, api_key="none")
    fields = {"model": MODEL, "max_tokens": 16, "temperature": 0}
    try:
        client.chat_completion(MESSAGES)
        unnamed = ""
    except Exception as error:
        unnamed = str(error)
    whole = client.chat_completion(MESSAGES, **fields)
    named = client.chat.completions.create(messages=MESSAGES, **fields)
    pieces = [c.choices[0].delta.content or "" for c in client.chat_completion(MESSAGES, stream=True, **fields)]
    history = [*MESSAGES, whole.choices[0].message, {"role": "user", "content": "And red?"}]
    again = client.chat_completion(history, **fields)
    print(
        json.dumps(
            {
                "version": version("huggingface_hub"),
                "whole": whole.choices[0].message.content,
                "named": named.choices[0].message.content,
                "pieces": pieces,
                "unnamed": unnamed,
                "again": again.choices[0].message.content,
            }
        )
    )


main()
