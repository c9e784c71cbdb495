"""tool-calls: a question and a few tools in, the call that answers it out."""

import json
import random
import re
from importlib.resources import files

from loraplex_training.config import AdapterShape, Schedule

from .task import Course, Demo, Pair
from .tool_chat import chat, other_tools
from .tool_families import ATTRIBUTES, COMMANDS, FAMILIES, HELD_OUT_FAMILIES, THINGS, ToolFamily
from .tool_request import Asked, ask, ask_anew
from .tool_values import KINDS, Value
from .tool_variety import make_everyday, make_paired, make_varied

_OPENERS = ("", "", "", "", "Please: ", "Hi! ", "Hello, ")
_JOINTS = (" And ", " Also: ", " Then ")


def called(answer: str) -> list[dict[str, object]] | None:
    """The calls that an answer makes, None where it is no list of calls."""
    match = re.fullmatch(r"\s*<tool_call>(.*)</tool_call>\s*", answer, re.DOTALL)
    try:
        calls = json.loads(match[1]) if match else None
    except ValueError:
        return None
    return calls if isinstance(calls, list) else None


def _make(rng: random.Random, held_out: bool) -> Pair:
    def draw() -> Asked:
        return ask_anew(rng, held_out, _family(rng, held_out), KINDS)

    asked = draw()
    tools = [asked.tool]
    questions, calls = [asked.question], [asked.call]
    others = other_tools(draw, asked, rng.choice((0, 1, 1, 2, 2)))
    kind = rng.random()
    if kind < 0.08:  # nothing fits
        tools = [other.tool for other in others] or [other_tools(draw, asked, 1)[0].tool]
        others, calls = [], []
    elif kind < 0.18:  # two calls, of one tool or of two
        second = others[0] if others else asked
        if second is asked:
            second = ask(rng, held_out, asked.family, asked.name, asked.own, KINDS)
        questions.append(second.question)
        calls.append(second.call)
    return chat(
        rng,
        lambda: rng.choice(_OPENERS) + rng.choice(_JOINTS).join(questions),
        calls,
        [*tools, *(other.tool for other in others)],
        (lambda: _result(rng, held_out)) if kind > 0.92 else None,  # the tool has answered
    )


def _family(rng: random.Random, held_out: bool) -> ToolFamily:
    kind = rng.random()
    if kind < 0.2:
        return ToolFamily(*_attribute(ATTRIBUTES.pick(rng, held_out), THINGS.pick(rng, held_out)))
    if kind < 0.4:
        return ToolFamily(*_command(COMMANDS.pick(rng, held_out), THINGS.pick(rng, held_out)))
    return rng.choice(HELD_OUT_FAMILIES if held_out else FAMILIES)


_Row = tuple[tuple[str, ...], str, tuple[str, ...], tuple[str, ...]]


def _attribute(attribute: str, thing: str) -> _Row:
    return (
        (f"get_{thing}_{attribute}",),
        f"{attribute.capitalize()} of a {thing}",
        (f"id|{thing}_id|{thing}: code",),
        (
            f"What is the {attribute} of {thing} {{id}}?",
            f"Tell me the {attribute} of the {thing} {{id}}.",
            f"{attribute.capitalize()} of {thing} {{id}}?",
        ),
    )


def _command(verb: str, thing: str) -> _Row:
    return (
        (f"{verb}_{thing}",),
        f"{verb.capitalize()} a {thing}",
        (f"id|{thing}_id|{thing}: code", "reason|note|comment?: phrase"),
        (
            f"{verb.capitalize()} {thing} {{id}}[, reason: {{reason}}].",
            f"Can you {verb} the {thing} {{id}}[ because of {{reason}}]?",
            f"I want to {verb} {thing} {{id}}[, note {{reason}}].",
        ),
    )


def _result(rng: random.Random, held_out: bool) -> dict[str, Value]:
    """What a tool might return."""
    fields: dict[str, Value] = {}
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.choice(("int", "number", "phrase", "time", "city", "code"))
        fields[ATTRIBUTES.pick(rng, held_out)] = KINDS[kind](rng, held_out)
    return fields


def _same_calls(expected: str, answer: str) -> bool:
    calls = called(expected)
    return answer.strip() == expected if calls is None else called(answer) == calls


TOOL_CALLS = Demo(
    name="tool-calls",
    description="Calls tools: picks the function for a question and fills in its arguments.",
    make=_make,
    accept=_same_calls,
    shape=AdapterShape(
        rank=8,
        alpha=16,
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        layers=tuple(range(10, 30)),
    ),
    schedule=Schedule(steps=400, lr=3e-3, batch_tokens=1024, validate_every=100),
    n_examples=3200,
    later=(
        Course(
            "second",
            make_varied,
            Schedule(steps=300, lr=2e-3, batch_tokens=1024, validate_every=150),
            n_examples=3000,
        ),
        Course(
            "third",
            make_everyday,
            Schedule(steps=320, lr=1.5e-3, batch_tokens=1024, validate_every=160),
            n_examples=3000,
        ),
        Course(
            "fourth",
            make_paired,
            Schedule(steps=640, lr=1.5e-3, batch_tokens=1024, validate_every=160),
            n_examples=5200,
        ),
    ),
    max_new_tokens=96,
    # Its questions are everyday ones; what asks for it is that there are tools to call.
    defaults={"auto": "with_tools"},
    shown=(
        "Call the right tool for this request.",
        "Use the given functions to answer.",
        "Which function should be called, and with which arguments?",
        "Answer with a tool call.",
    ),
    chat_template=(files(__package__) / "tool_calls.jinja").read_text("utf-8"),
)
