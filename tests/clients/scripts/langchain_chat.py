"""A LangChain chat model as its users call it: python langchain_chat.py BASE_URL MODEL. Prints what it saw."""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.metadata import version

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
MESSAGES = [SystemMessage("You are brief."), HumanMessage("Why is the sky blue?")]


def main():
    model = ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key="none", temperature=0, max_tokens=16, seed=1)
    whole = model.invoke(MESSAGES)
    try:
        refused = model.invoke(MESSAGES, max_tokens=1_000_000).content
    except Exception as error:
        refused = type(error).__name__
    chain = (
        ChatPromptTemplate.from_messages([("system", "You are brief."), ("user", "{question}")])
        | model
        | StrOutputParser()
    )
    print(
        json.dumps(
            {
                "version": version("langchain-openai"),
                "whole": whole.content,
                "refused": refused,
                "usage": whole.usage_metadata["output_tokens"],
                "finish": whole.response_metadata["finish_reason"],
                "pieces": [chunk.content for chunk in model.stream(MESSAGES)],
                "async": asyncio.run(model.ainvoke(MESSAGES)).content,
                "batch": [m.content for m in model.batch([MESSAGES, MESSAGES])],
                "chain": chain.invoke({"question": "Why is the sky blue?"}),
            }
        )
    )


main()
