"""Draws the next request: its adapter and its prompt. One seed decides everything random."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd
from typing import Any, Protocol

from .scenario import Phase, RequestSpec

_TEXT = (
    "the server keeps one frozen base model in memory and applies a different adapter to every "
    "request in the batch while new adapters are loaded in the background without stopping "
    "anybody who is already reading"
)
_WORDS = _TEXT.split()
_OPERATIONS = (
    "Write the date",
    "Spell the number",
    "Give the past tense of the verb",
    "Write the plural of the word",
)
_LANGUAGES = ("English", "German", "French", "Spanish", "Italian")
_FORMATS = ("as JSON", "inside answer tags", "in upper case", "as a plain line")


class Body(Protocol):
    """Return the request fields that choose an adapter on one kind of server."""

    def __call__(self, family: str, name: str | None) -> Mapping[str, Any]: ...


class LoraplexBody:
    def __init__(self, model: str = "base") -> None:
        self._model = model

    def __call__(self, family: str, name: str | None) -> Mapping[str, Any]:
        if family == "base":
            return {"model": self._model}
        if family == "generated":
            return {"model": self._model, "adapter": {"description": name}}
        return {"model": self._model, "adapter": name}


def _stride(n: int) -> int:
    """Return a stride coprime to ``n``, so that each adapter is drawn before any is repeated."""
    stride = max(1, round(0.618 * n))
    while gcd(stride, n) > 1:
        stride += 1
    return stride


@dataclass(frozen=True, slots=True)
class LoadRequest:
    family: str
    name: str | None  # of the adapter; the description of a generated one
    body: dict[str, Any]


class Traffic:
    """Draws the requests of one phase. The i-th request is the same in every run."""

    def __init__(
        self,
        phase: Phase,
        request: RequestSpec,
        names: Mapping[str, Sequence[str]],
        body: Body,
        seed: int,
    ) -> None:
        """``names`` are by family; ``churned`` may change while the phase runs."""
        self._phase = phase
        self._request = request
        self._names = names
        self._body = body
        self._random = random.Random(f"{seed}/{phase.label}")
        self._count: dict[str, int] = {}
        self._n_asked = 0
        shares = [(family, share) for family, share in phase.mix.items() if share]
        self._families = [family for family, _ in shares]
        self._shares = [share for _, share in shares]

    def next(self, progress: float) -> LoadRequest:
        """Draw the next request. ``progress`` is that of the phase, from 0 to 1."""
        family = self._random.choices(self._families, self._shares)[0]
        name = self._pick(family, min(max(progress, 0.0), 1.0))
        if family == "churned" and name is None:
            family = "base"  # nothing is registered at this moment
        self._n_asked += 1
        body = {
            "messages": [{"role": "user", "content": self._prompt()}],
            "max_tokens": self._request.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._ending(),
            **self._body(family, name),
        }
        return LoadRequest(family, name, body)

    def _ending(self) -> dict[str, Any]:
        """Return the body. Answers end at ``max_tokens`` or with the schema's object."""
        if not self._phase.structured:
            return {"ignore_eos": True}
        schema = {"name": "load", "schema": self._request.json_schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}

    def _pick(self, family: str, progress: float) -> str | None:
        if family == "base":
            return None
        if family == "generated":
            return self._description()
        names = self._names[family]
        if not names:
            return None
        if family == "churned":
            return self._random.choice(list(names))
        if family != "lora":
            return names[self._advance(family) % len(names)]
        n = self._phase.adapters or len(names)
        return names[self._index(n, progress) % len(names)]

    def _index(self, n: int, progress: float) -> int:
        if self._phase.pick == "round-robin":
            # Strides of the golden section: a short phase reaches all parts of many adapters.
            return self._advance("lora") * _stride(n) % n
        if self._phase.pick == "fresh":  # never one that was used before in this phase
            return self._advance("lora")
        begin, end = self._phase.zipf
        exponent = begin + (end - begin) * progress
        weights = list(accumulate((rank + 1) ** -exponent for rank in range(n)))
        index = self._random.choices(range(n), cum_weights=weights)[0]
        return (index + int(self._phase.drift * progress * n)) % n

    def _advance(self, family: str) -> int:
        at = self._count.get(family, 0)
        self._count[family] = at + 1
        return at

    def _prompt(self) -> str:
        """Return a prompt with a unique first word, so that no prefix cache helps."""
        k = self._n_asked % len(_WORDS)
        salt = f"{self._random.getrandbits(40):x}"
        n = self._request.prompt_chars
        text = " ".join((_WORDS[k:] + _WORDS[:k]) * (n // len(_TEXT) + 2))
        return f"{salt} {text}"[:n]

    def _description(self) -> str:
        pick = self._random.choice
        return f"{pick(_OPERATIONS)} in {pick(_LANGUAGES)} {pick(_FORMATS)}"
