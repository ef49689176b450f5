"""A LiteLLM proxy before us, and an openai client before it: python litellm_proxy.py BASE_URL MODEL.

The proxy serves MODEL as "ours". Prints what the client saw.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import openai

KEY = f"sk-{secrets.token_hex(32)}"
BASE_URL, MODEL = sys.argv[1], sys.argv[2]
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "inhabitants": {"type": "integer", "maximum": 9}},
    "required": ["name", "inhabitants"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "found", "description": "Founds a city.", "parameters": CITY}}


@contextlib.contextmanager
def proxy():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    with tempfile.TemporaryDirectory() as place:
        config = Path(place, "config.yaml")
        served = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": "none"}
        config.write_text(json.dumps({"model_list": [{"model_name": "ours", "litellm_params": served}]}))
        command = [
            Path(sys.executable).parent / "litellm",
            "--config",
            config,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY}
        log = Path(place, "log")
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=place)
        try:
            _wait(port, process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(20)


def _wait(port, process, log):
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness"):
            return
        time.sleep(0.2)
    raise SystemExit(f"the proxy did not start:\n{log.read_text()[-3000:]}")


def error_of(call):
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.code, error.message]
    return None


def main():
    with proxy() as url, openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=90) as client:
        asked = {"model": "ours", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
        create = client.chat.completions.create
        whole = create(**asked)
        chunks = list(create(**asked, stream=True, stream_options={"include_usage": True}))
        one = {**asked, "tools": [TOOL], "parallel_tool_calls": False, "max_tokens": 80}
        called = create(**one, tool_choice="required").choices[0].message.tool_calls
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
        object_ = create(**{**asked, "max_tokens": 80}, response_format=form)
        response = client.responses.create(
            model="ours", input="Why is the sky blue?", max_output_tokens=16, temperature=0
        )
        seen = {
            "version": version("litellm"),
            "whole": whole.choices[0].message.content,
            "usage": whole.usage.completion_tokens,
            "pieces": [c.choices[0].delta.content or "" for c in chunks if c.choices],
            "streamed": [c.usage.completion_tokens for c in chunks if c.usage],
            "called": [[c.function.name, json.loads(c.function.arguments)] for c in called],
            "object": json.loads(object_.choices[0].message.content),
            "response": response.output_text,
            "too_long": error_of(lambda: create(**{**asked, "max_tokens": 1_000_000})),
            "bad_value": error_of(lambda: create(**{**asked, "temperature": -1})),
        }
    print(json.dumps(seen))


main()
