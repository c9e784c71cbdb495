"""Streams a stored response again, as OpenAI's ``responses.retrieve(stream=True)`` reads it."""

from collections.abc import Iterator
from typing import Any

import orjson

from .responses_format import EventWriter

Item = dict[str, Any]


def replayed(answer: bytes, starting_after: int) -> bytes:
    """Return the events behind number ``starting_after``; each text comes in one delta."""
    response: Item = orjson.loads(answer)
    events = EventWriter()
    begun = {**response, "status": "in_progress", "output": [], "usage": None}
    begun["incomplete_details"] = None
    frames = [
        events.event(f"response.{kind}", response=begun) for kind in ("created", "in_progress")
    ]
    for index, item in enumerate(response["output"]):
        frames += _events_of_item(events, index, item)
    frames.append(events.event(f"response.{response['status']}", response=response))
    return b"".join(frames[starting_after + 1 :])


def _events_of_item(events: EventWriter, index: int, item: Item) -> Iterator[bytes]:
    def of_item(kind: str, **fields: object) -> bytes:
        return events.event(f"response.{kind}", item_id=item["id"], output_index=index, **fields)

    added = {**item, "status": "in_progress"}
    added |= {name: empty for name, empty in (("content", []), ("arguments", "")) if name in item}
    yield events.event("response.output_item.added", output_index=index, item=added)
    for at, part in enumerate(item.get("content", ())):
        logprobs = {name: part[name] for name in ("logprobs",) if name in part}
        blank = {**part, "text": "", **{name: [] for name in logprobs}}
        yield of_item("content_part.added", content_index=at, part=blank)
        yield of_item(f"{part['type']}.delta", content_index=at, delta=part["text"], **logprobs)
        yield of_item(f"{part['type']}.done", content_index=at, text=part["text"], **logprobs)
        yield of_item("content_part.done", content_index=at, part=part)
    if "arguments" in item:
        arguments = item["arguments"]
        yield of_item("function_call_arguments.delta", delta=arguments)
        yield of_item("function_call_arguments.done", name=item["name"], arguments=arguments)
    yield events.event("response.output_item.done", output_index=index, item=item)
