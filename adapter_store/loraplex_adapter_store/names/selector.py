"""The request's ``adapter`` value, parsed: a name, a mixture, a description, or ``auto``."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from loraplex_adapter_store.errors import InvalidSelector
from loraplex_adapter_store.files.safetensors_reader import json_kind

from .name_syntax import check_name

MAX_PARTS = 16
MAX_DESCRIPTION = 2000
MIN_EXAMPLES, MAX_EXAMPLES = 2, 64
MAX_EXAMPLE = 4000  # characters of a prompt or an answer
ARROW_TOP_K = 3  # experts of a token in one projection, unless the request says
GenerationMethod = Literal["auto", "multi-task", "sg-lora", "icm-lora"]
METHODS: tuple[str, ...] = get_args(GenerationMethod)

_DIGEST_PREFIX = re.compile(r"[0-9a-f]{4,64}")
_FORMS = (
    '"name", "name@digest-prefix", {"name", "digest"}, [{"name", "weight"}, …], '
    '{"description", "method", "examples", "wait"}, '
    '{"arrow": ["name", …], "top_k", "temperature"} or "auto"'
)


@dataclass(frozen=True, slots=True)
class NameRef:
    """A registered adapter; with a digest prefix, one of its revisions."""

    name: str
    digest_prefix: str | None = None

    def __str__(self) -> str:
        return self.name if self.digest_prefix is None else f"{self.name}@{self.digest_prefix}"


@dataclass(frozen=True, slots=True)
class MixturePart:
    ref: NameRef
    weight: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """The sum W + Σ weight · ΔW, exactly: factors concatenated along the rank."""

    parts: tuple[MixturePart, ...]

    def __str__(self) -> str:
        return " + ".join(f"{part.weight:g}*{part.ref}" for part in self.parts)


@dataclass(frozen=True, slots=True)
class Library:
    """Several plain LoRAs, of which Arrow gives each token the best ``top_k``."""

    refs: tuple[NameRef, ...]
    top_k: int
    temperature: float = 1.0

    def __str__(self) -> str:
        return f"arrow({', '.join(map(str, self.refs))}; {self.top_k})"


@dataclass(frozen=True, slots=True)
class Description:
    """An adapter that is generated from a sentence, and learnt from examples, if any."""

    text: str
    method: str = "auto"
    examples: tuple[tuple[str, str], ...] = ()  # prompt and answer
    wait: bool = False  # True: answer with the learnt adapter, not with the draft


@dataclass(frozen=True, slots=True)
class Auto:
    """The router chooses among the registered adapters."""


Selector = NameRef | Mixture | Library | Description | Auto


def parse_selector(value: object) -> Selector:
    """Parse decoded JSON. Raises InvalidSelector or InvalidName, both with a remedy."""
    if isinstance(value, str):
        return Auto() if value == "auto" else _name(value)
    if isinstance(value, Mapping):
        if "description" in value:
            return _description(value)
        if "arrow" in value:
            return _library(value)
        if "name" in value and "weight" not in value:
            _only(value, {"name", "digest"})
            return _name(value["name"], value.get("digest"))
        if "name" in value:
            return _mixture([value])
        raise InvalidSelector(f"adapter object needs 'name' or 'description'; forms: {_FORMS}")
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return _mixture(value)
    raise InvalidSelector(f"adapter is {json_kind(value)}; forms: {_FORMS}")


def _name(name: object, digest: object = None) -> NameRef:
    if not isinstance(name, str):
        raise InvalidSelector(f"adapter name must be a string, not {json_kind(name)}")
    if "@" in name:
        if digest is not None:
            raise InvalidSelector(f"adapter {name!r} gives its digest twice")
        name, _, digest = name.partition("@")
    if digest is not None and (not isinstance(digest, str) or not _DIGEST_PREFIX.fullmatch(digest)):
        raise InvalidSelector(f"digest {digest!r} must be 4 to 64 lower-case hex digits")
    return NameRef(check_name(name), digest)


def _mixture(value: Sequence[object]) -> Mixture:
    if not 1 <= len(value) <= MAX_PARTS:
        raise InvalidSelector(f"a mixture has 1 to {MAX_PARTS} parts, not {len(value)}")
    parts = []
    for item in value:
        if not isinstance(item, Mapping) or "name" not in item:
            raise InvalidSelector('each part of a mixture is {"name": …, "weight": number}')
        _only(item, {"name", "digest", "weight"})
        weight = item.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise InvalidSelector(f"weight of {item['name']!r} must be a number, not {weight!r}")
        if not math.isfinite(weight) or abs(weight) > 100:
            raise InvalidSelector(f"weight of {item['name']!r} must lie in [-100, 100]: {weight!r}")
        parts.append(MixturePart(_name(item["name"], item.get("digest")), float(weight)))
    return Mixture(tuple(parts))


def _library(value: Mapping[object, object]) -> Library:
    _only(value, {"arrow", "top_k", "temperature"})
    names, temperature = value["arrow"], value.get("temperature", 1.0)
    if (
        not isinstance(names, Sequence)
        or isinstance(names, str)
        or not 2 <= len(names) <= MAX_PARTS
    ):
        raise InvalidSelector(f'"arrow" is a list of 2 to {MAX_PARTS} adapter names')
    refs = tuple(_name(name) for name in names)
    if len(set(refs)) != len(refs):
        raise InvalidSelector('"arrow" names an adapter twice')
    top_k = value.get("top_k", min(ARROW_TOP_K, len(refs)))
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= len(refs):
        raise InvalidSelector(f"top_k of arrow must be 1 to {len(refs)}, not {top_k!r}")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise InvalidSelector(f"temperature of arrow must be a number, not {temperature!r}")
    if not 1e-3 <= temperature <= 1e3:
        raise InvalidSelector(f"temperature of arrow must lie in [0.001, 1000]: {temperature!r}")
    return Library(refs, top_k, float(temperature))


def _description(value: Mapping[object, object]) -> Description:
    _only(value, {"description", "method", "examples", "wait"})
    text, method = value["description"], value.get("method", "auto")
    if not isinstance(text, str) or not text.strip():
        raise InvalidSelector("description must be a sentence that says what the adapter should do")
    if len(text) > MAX_DESCRIPTION:
        raise InvalidSelector(f"description has {len(text)} characters, at most {MAX_DESCRIPTION}")
    if method not in METHODS:
        raise InvalidSelector(f"method {method!r} is unknown; known: {', '.join(METHODS)}")
    examples, wait = value.get("examples"), value.get("wait", False)
    if not isinstance(wait, bool):
        raise InvalidSelector(f"wait of a description must be true or false, not {wait!r}")
    pairs = () if examples is None else _examples(examples)
    return Description(text.strip(), str(method), pairs, wait)


def _examples(value: object) -> tuple[tuple[str, str], ...]:
    form = '{"prompt": "…", "answer": "…"}'
    if not isinstance(value, list | tuple) or not MIN_EXAMPLES <= len(value) <= MAX_EXAMPLES:
        raise InvalidSelector(f"examples are a list of {MIN_EXAMPLES} to {MAX_EXAMPLES} of {form}")
    pairs = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, Mapping) or set(item) != {"prompt", "answer"}:
            raise InvalidSelector(f"example {number} must be {form}")
        prompt, answer = item["prompt"], item["answer"]
        if not all(isinstance(t, str) and 0 < len(t) <= MAX_EXAMPLE for t in (prompt, answer)):
            raise InvalidSelector(
                f"prompt and answer of example {number} must be texts of 1 to {MAX_EXAMPLE} "
                "characters"
            )
        pairs.append((prompt, answer))
    return tuple(pairs)


def _only(value: Mapping[object, object], known: set[str]) -> None:
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        raise InvalidSelector(f"unknown keys {unknown} in adapter; known: {sorted(known)}")
