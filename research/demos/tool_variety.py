"""The later courses of tool-calls: what the first one left weak.

Rare and invented words that can only be copied, more tools to choose from, questions without a word
in common with the tool, and twice as often two calls in one answer. The third course has more such
questions, and real names that are easily mistaken for others. The fourth asks for two calls in half
of its chats.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from .everyday_tools import EVERYDAY_FAMILIES, PEOPLE, PLACES
from .more_tools import MORE_FAMILIES, MORE_THINGS, MORE_VERBS, PROPERTIES, WORDS, words
from .task import Pair
from .tool_chat import chat, other_tools
from .tool_families import ATTRIBUTES, COMMANDS, FAMILIES, THINGS, ToolFamily
from .tool_request import Asked, ask, ask_anew
from .tool_values import KINDS, Draw, Value
from .words import LAST_NAMES

_OPENERS = ("", "", "", "", "", "Please: ", "Hi! ", "Hello, ", "Hey, ", "OK. ", "One more thing: ")
_JOINTS = (" And ", " Also: ", " Then ", " ", " Besides, ", " After that: ", "\n")
_ANSWERED = 0.06  # … where a tool has answered
_RARE = 0.5  # the share of values that are rare or invented
_STARTS = words("b br ch d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t th tr v w y z")
_VOWELS = words("a e i o u a e i o u ai ea ei ie oa oo ou y")
_ENDS = (*words("b ck d f g k l ll m n ng nd nt p r rk rn s st t th x z"), *("",) * 10)
_DOMAINS = words("com org net io de fr eu co.uk dev info")
_TYPES = words("md json yaml py log mp3 jpg xlsx html tar.gz")


@dataclass(frozen=True, slots=True)
class _Mix:
    """What the chats of a course are drawn from."""

    nothing: float  # the share of questions that no tool answers
    two: float  # … of chats that need two calls
    families: tuple[tuple[float, tuple[ToolFamily, ...]], ...]  # (up to this share, one of these)
    kinds: Mapping[str, Draw]


def make_varied(rng: random.Random, held_out: bool) -> Pair:
    """A chat of the second course; none is held out, so ``held_out`` must be False."""
    return _make(rng, held_out, _VARIED)


def make_everyday(rng: random.Random, held_out: bool) -> Pair:
    """A chat of the third course, likewise."""
    return _make(rng, held_out, _EVERYDAY)


def make_paired(rng: random.Random, held_out: bool) -> Pair:
    """A chat of the fourth course, likewise."""
    return _make(rng, held_out, _PAIRED)


def _make(rng: random.Random, held_out: bool, mix: _Mix) -> Pair:
    if held_out:
        raise ValueError("held-out chats are those of the first course")

    def draw() -> Asked:
        return ask_anew(rng, False, _family(rng, mix), mix.kinds)

    asked = draw()
    others = other_tools(draw, asked, rng.choice((0, 1, 1, 2, 2, 3)))
    questions, calls, tools = [asked.question], [asked.call], [asked.tool]
    kind = rng.random()
    if kind < mix.nothing:
        others = others or other_tools(draw, asked, 1)
        tools, calls = [], []
    elif kind < mix.nothing + mix.two:
        second = others[0] if others and rng.random() < 0.7 else None
        if second is None:
            second = ask(rng, False, asked.family, asked.name, asked.own, mix.kinds)
        questions.append(second.question)
        calls.append(second.call)
    return chat(
        rng,
        lambda: rng.choice(_OPENERS) + rng.choice(_JOINTS).join(questions),
        calls,
        [*tools, *(other.tool for other in others)],
        (lambda: _result(rng, mix)) if kind > 1 - _ANSWERED else None,
    )


def _family(rng: random.Random, mix: _Mix) -> ToolFamily:
    kind = rng.random()
    if kind < 0.15:
        return _property_tool(rng)
    if kind < 0.33:
        return _verb_tool(rng)
    return rng.choice(next(families for share, families in mix.families if kind < share))


def _property_tool(rng: random.Random) -> ToolFamily:
    name, thing = _one(rng, PROPERTIES, ATTRIBUTES.pick(rng, False)), _thing(rng)
    said = name.replace("_", " ")
    return ToolFamily(
        (f"get_{thing}_{name}", f"{thing}_{name}", f"read_{name}_of_{thing}"),
        f"{said.capitalize()} of a {thing}",
        (f"id|{thing}_id|{thing}|number|key: code",),
        (
            f"What is the {said} of {thing} {{id}}?",
            f"Tell me the {said} of the {thing} {{id}}.",
            f"{said.capitalize()} of {thing} {{id}}?",
            f"I need to know the {said} of {{id}}, a {thing}.",
            f"{{id}}: what {said} does this {thing} have?",
        ),
    )


def _verb_tool(rng: random.Random) -> ToolFamily:
    verb, thing = _one(rng, MORE_VERBS, COMMANDS.pick(rng, False)), _thing(rng)
    return ToolFamily(
        (f"{verb}_{thing}", f"{thing}_{verb}"),
        f"{verb.capitalize()} a {thing}",
        (
            f"id|{thing}_id|{thing}|number|key: code",
            "reason|note|comment|remark|why?: phrase",
        ),
        (
            f"{verb.capitalize()} {thing} {{id}}[, reason: {{reason}}].",
            f"Can you {verb} the {thing} {{id}}[ because of {{reason}}]?",
            f"I want to {verb} {thing} {{id}}[, note {{reason}}].",
            f"We have to {verb} the {thing} {{id}}[ due to {{reason}}].",
            f"{thing.capitalize()} {{id}}: {verb} it[, {{reason}}].",
        ),
    )


def _thing(rng: random.Random) -> str:
    return _one(rng, MORE_THINGS, THINGS.pick(rng, False))


def _one(rng: random.Random, more: tuple[str, ...], known: str) -> str:
    return rng.choice(more) if rng.random() < 0.75 else known


def _result(rng: random.Random, mix: _Mix) -> dict[str, Value]:
    fields: dict[str, Value] = {}
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.choice(("int", "number", "phrase", "time", "city", "code"))
        name = _one(rng, PROPERTIES, ATTRIBUTES.pick(rng, False)).replace("_", " ")
        fields[name] = mix.kinds[kind](rng, False)
    return fields


def _invented(rng: random.Random) -> str:
    """A word that no memory helps to write."""
    n = rng.choice((1, 2, 2, 2, 3))
    syllables = (rng.choice(_STARTS) + rng.choice(_VOWELS) + rng.choice(_ENDS) for _ in range(n))
    return "".join(syllables)


def _word(rng: random.Random, held_out: bool) -> str:
    return rng.choice(WORDS) if rng.random() < 0.7 else _invented(rng)


def _name(rng: random.Random, held_out: bool) -> str:
    return _invented(rng).capitalize()


def _full_name(rng: random.Random, held_out: bool) -> str:
    names = [_invented(rng).capitalize() for _ in range(rng.choice((1, 2, 2)))]
    return " ".join(names)


def _topic(rng: random.Random, held_out: bool) -> str:
    other = _word(rng, held_out)
    if rng.random() < 0.7:
        return other
    forms = (f"old {other}", f"{rng.choice(WORDS)} and {other}", f"{other} for beginners")
    return rng.choice(forms)


def _rare_phrase(rng: random.Random, held_out: bool) -> str:
    words = [_word(rng, held_out) for _ in range(rng.choice((1, 2, 2, 3)))]
    return " ".join(words)


def _rare_email(rng: random.Random, held_out: bool) -> str:
    user = rng.choice((_invented(rng), f"{_invented(rng)}.{_invented(rng)}", rng.choice(WORDS)))
    host = rng.choice((_invented(rng), rng.choice(WORDS)))
    number = rng.choice(("", "", str(rng.randrange(2, 100))))
    return f"{user}{number}@{host}.{rng.choice(_DOMAINS)}"


def _rare_path(rng: random.Random, held_out: bool) -> str:
    name = f"{_word(rng, held_out)}{rng.choice(('', '', str(rng.randrange(1, 100))))}"
    folder = rng.choice(("", "", "", f"{rng.choice(WORDS)}/"))
    known = KINDS["path"](rng, False)
    ending = rng.choice((rng.choice(_TYPES), str(known).rpartition(".")[2]))
    return f"{folder}{name}.{ending}"


def _rare_code(rng: random.Random, held_out: bool) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.choice((1, 2, 3))))
    digits = str(rng.randrange(10, 1_000_000))
    forms = (digits, f"{letters}-{digits}", f"{letters}{digits}", f"{digits}-{letters}")
    return rng.choice(forms)


def _mixed(usual: Draw, rare: Draw) -> Draw:
    def draw(rng: random.Random, held_out: bool) -> Value:
        return (rare if rng.random() < _RARE else usual)(rng, held_out)

    return draw


_RARE_KINDS: dict[str, Draw] = {
    "city": _name,
    "person": _full_name,
    "email": _rare_email,
    "phrase": _rare_phrase,
    "path": _rare_path,
    "code": _rare_code,
    "room": _word,
    "language": _name,
    "cuisine": _name,
    "sport": _word,
    "thing": _word,
}


def _place(rng: random.Random, held_out: bool) -> str:
    return rng.choice(PLACES)


def _real_person(rng: random.Random, held_out: bool) -> str:
    first = rng.choice(PEOPLE)
    return first if rng.random() < 0.4 else f"{first} {LAST_NAMES.pick(rng, False)}"


def _dotted_email(rng: random.Random, held_out: bool) -> str:
    last = rng.choice((LAST_NAMES.pick(rng, False).lower(), _invented(rng)))
    user = rng.choice((f"{rng.choice(PEOPLE)}.{last}", f"{rng.choice(PEOPLE)}{rng.randrange(100)}"))
    host = rng.choice((_invented(rng), rng.choice(WORDS)))
    return f"{user.lower()}@{host}.{rng.choice(_DOMAINS)}"


_VARIED = _Mix(
    nothing=0.10,
    two=0.36,
    families=((0.83, MORE_FAMILIES), (1.0, FAMILIES)),
    kinds={
        **KINDS,
        **{kind: _mixed(KINDS[kind], rare) for kind, rare in _RARE_KINDS.items()},
        "word": _word,
        "topic": _topic,
    },
)
_EVERYDAY = _Mix(
    nothing=0.07,
    two=0.36,
    families=((0.75, EVERYDAY_FAMILIES), (0.93, MORE_FAMILIES), (1.0, FAMILIES)),
    kinds={
        **_VARIED.kinds,
        "city": _mixed(_VARIED.kinds["city"], _place),
        "person": _mixed(_VARIED.kinds["person"], _real_person),
        "email": _mixed(_VARIED.kinds["email"], _dotted_email),
    },
)
_PAIRED = _Mix(
    nothing=0.10,
    two=0.5,
    families=((0.66, EVERYDAY_FAMILIES), (0.90, MORE_FAMILIES), (1.0, FAMILIES)),
    kinds=_EVERYDAY.kinds,
)
