"""A LangChain chain whose steps are different adapters of one base.

pip install langchain-openai
python examples/langchain_chat.py
"""

from __future__ import annotations

import os

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

URL = os.environ.get("LORAPLEX_URL", "http://127.0.0.1:8000")


def chat(adapter: str) -> ChatOpenAI:
    return ChatOpenAI(
        model=adapter,
        base_url=f"{URL}/v1",
        api_key=os.environ.get("LORAPLEX_API_KEY", "none"),  # type: ignore[arg-type]
        temperature=0,
        max_completion_tokens=48,
        timeout=600,
    )


text = ChatPromptTemplate.from_messages([("user", "{text}")])
sentiment = text | chat("sentiment") | StrOutputParser()
pirate = text | chat("pirate") | StrOutputParser()

reviews = ["The soup was cold and the waiter rude.", "What a lovely evening, thank you!"]
for review, verdict in zip(
    reviews, sentiment.batch([{"text": review} for review in reviews]), strict=True
):
    print(f"{verdict}: {review}")
print(pirate.invoke({"text": f"Answer this review: {reviews[0]}"}))
