"""A chat with tools out of requests to them, as training data; all courses of tool-calls end here.

What is drawn, and in which order, is part of the data: the demo's card has their digest.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence

from loraplex_training.examples import Message

from .task import Pair
from .tool_request import Asked, Call, written
from .tool_values import Value


def other_tools(draw: Callable[[], Asked], asked: Asked, n: int) -> list[Asked]:
    """``n`` requests to other tools, each drawn until it asks for none that is there already."""
    found: list[Asked] = []
    taken = {asked.family.description}
    while len(found) < n:
        other = draw()
        if other.family.description not in taken:
            taken.add(other.family.description)
            found.append(other)
    return found


def chat(
    rng: random.Random,
    prompt: Callable[[], str],
    calls: list[Call],
    tools: Sequence[dict[str, object]],
    result: Callable[[], Mapping[str, Value]] | None,
) -> Pair:
    """``result``: what the tool gave, which the answer then says; None: the answer is the calls."""
    shown = list(tools)
    rng.shuffle(shown)
    question, answer = prompt(), written(calls)
    if result is None:
        return Pair(question, answer, tuple(shown))
    fields = result()
    said = " and ".join(f"the {name} is {value}" for name, value in fields.items())
    turns = (
        Message(role="assistant", content=answer),
        Message(role="tool", content=json.dumps(fields)),
    )
    return Pair(question, f"{said[0].upper()}{said[1:]}.", tuple(shown), turns)
