"""One request to a tool, as training data: the tool, a question in some wording, the call."""

import json
import random
import re
from collections.abc import Mapping
from typing import NamedTuple

from .tool_families import ToolFamily
from .tool_values import VALUE_TYPES, Draw, Value


class Call(NamedTuple):
    tool: str
    arguments: dict[str, Value]


class Asked(NamedTuple):
    family: ToolFamily
    name: str
    own: tuple[str, ...]  # what its parameters are called this time
    tool: dict[str, object]  # as the client declares it
    question: str
    call: Call


def ask(
    rng: random.Random,
    held_out: bool,
    family: ToolFamily,
    name: str,
    own: tuple[str, ...],
    kinds: Mapping[str, Draw],
) -> Asked:
    """One question to ``family``, which is called ``name`` and its parameters ``own``."""
    properties: dict[str, object] = {}
    arguments: dict[str, Value] = {}
    required, fill = [], {}
    says_more = rng.random() < 0.5
    for parameter, called_so in zip(family.parameters, own, strict=True):
        names, _, kind = parameter.partition(": ")
        optional = names.endswith("?")
        value: Value
        if kind.startswith("="):
            options = kind[1:].split("|")
            properties[called_so] = {"type": "string", "enum": options}
            value = rng.choice(options)
        else:
            properties[called_so] = {"type": VALUE_TYPES.get(kind, "string")}
            value = kinds[kind](rng, held_out)
            while value in arguments.values():  # from and to are two cities
                value = kinds[kind](rng, held_out)
        fill[names_of(parameter)[0]] = value
        if not optional:
            required.append(called_so)
        if says_more or not optional:
            arguments[called_so] = value
    wording = rng.choice(family.wordings)
    wording = re.sub(r"\[(.*?)\]", r"\1" if says_more else "", wording)
    function: dict[str, object] = {
        "name": name,
        "description": family.description,
        "parameters": {"type": "object", "properties": properties, "required": required},
    }
    return Asked(
        family,
        name,
        own,
        {"type": "function", "function": function},
        wording.format(**fill),
        Call(name, arguments),
    )


def ask_anew(
    rng: random.Random, held_out: bool, family: ToolFamily, kinds: Mapping[str, Draw]
) -> Asked:
    """``ask`` with one of the family's names, and one of each parameter's."""
    own = tuple(rng.choice(names_of(parameter)) for parameter in family.parameters)
    return ask(rng, held_out, family, rng.choice(family.names), own, kinds)


def names_of(parameter: str) -> list[str]:
    return parameter.partition(": ")[0].rstrip("?").split("|")


def written(calls: list[Call]) -> str:
    listed = [{"name": call.tool, "arguments": call.arguments} for call in calls]
    return f"<tool_call>{json.dumps(listed)}</tool_call>"
