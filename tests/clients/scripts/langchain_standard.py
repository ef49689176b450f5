"""LangChain's own tests of chat models, all that are asked of ChatOpenAI: python langchain_standard.py BASE_URL MODEL.

Prints what became of each, and the last words of those that failed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version

import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestServed(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {
            "model": os.environ["MODEL"],
            "base_url": os.environ["BASE_URL"],
            "api_key": "none",
            "temperature": 0,
            "max_tokens": 80,  # a small model does not always find its end
            "max_retries": 0,
            "stream_usage": True,
        }


class Seen:
    def __init__(self):
        self.outcomes, self.words = {}, {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.rpartition("::")[2]
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[name] = report.outcome
        if report.failed:
            self.words[name] = str(report.longrepr)[-1500:]


def main():
    os.environ.update(BASE_URL=sys.argv[1], MODEL=sys.argv[2])
    seen = Seen()
    with tempfile.TemporaryDirectory() as away:
        options = [
            "--noconftest",
            "-c",
            os.devnull,
            "--rootdir",
            away,
            "-p",
            "no:cacheprovider",
            "-k",
            "not stream_time",
        ]
        # One loop: the client keeps its connections, and they belong to the loop that made them.
        one = ("asyncio_default_test_loop_scope=session", "asyncio_default_fixture_loop_scope=session")
        asyncio_mode = [word for option in ("asyncio_mode=auto", *one) for word in ("-o", option)]
        pytest.main([__file__, "-q", *options, *asyncio_mode, *sys.argv[3:]], plugins=[seen])
    print(json.dumps({"version": version("langchain-tests"), "outcomes": seen.outcomes, "words": seen.words}))


if __name__ == "__main__":
    main()
