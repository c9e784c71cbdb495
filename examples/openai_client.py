"""Adapters through OpenAI's client: the field `adapter` is the only new thing.

python examples/openai_client.py
"""

from __future__ import annotations

import json
import os
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

URL = os.environ.get("LORAPLEX_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("LORAPLEX_API_KEY", "none"))


def ask(text: str, adapter: Any, **fields: Any) -> str:
    """``adapter``: a name, a sum as a list, "auto" or a description as an object."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": text}]
    answer = client.chat.completions.create(
        model="base",
        messages=messages,
        temperature=0,
        max_tokens=48,
        extra_body={"adapter": adapter},
        **fields,
    )
    return answer.choices[0].message.content or ""


print("streamed, through pirate:")
stream = client.chat.completions.create(
    model="pirate",  # a client that cannot send more fields names the adapter here
    messages=[{"role": "user", "content": "Hello! Who are you?"}],
    temperature=0,
    max_tokens=48,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

print("\none adapter:", ask("437", "german-numbers"))
both = [{"name": "pirate", "weight": 0.7}, {"name": "emoji", "weight": 0.3}]
print("a sum of two:", ask("I ate a pizza by the sea.", both))
print("auto:", ask("Extract the e-mail address: write to ada@example.org today.", "auto"))

text = {"type": "string", "maxLength": 20}
schema = {
    "type": "object",
    "properties": {"name": text, "age": {"type": "integer"}, "city": text, "job": text},
    "required": ["name", "age", "city", "job"],
    "additionalProperties": False,
}
person = ask(
    "Ada is 36 years old, lives in London and works as a writer.",
    "json-answers",
    response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
)
print("a schema:", json.loads(person))
