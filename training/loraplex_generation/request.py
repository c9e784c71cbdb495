"""A request for an adapter from a sentence, with or without pairs of prompt and answer."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from .examples import Example


@dataclass(frozen=True, slots=True)
class AdapterGenerationRequest:
    """A request for an adapter. Equal requests share one adapter."""

    description: str
    wordings: tuple[str, ...] = ()  # further descriptions; methods average over them
    prompts: tuple[str, ...] = ()  # unlabelled inputs of the task, which only ICM-LoRA reads
    method: str = "auto"
    seed: int = 0
    samples: int = 0  # number of latent draws that are averaged; 0 decodes the centre
    examples: tuple[tuple[str, str], ...] = ()  # prompt and answer
    force: bool = False  # accept a description that is out of distribution
    library: str = ""  # identity of the adapters that are mixed, so that a change makes a new one

    @property
    def texts(self) -> tuple[str, ...]:
        """The description and its other wordings."""
        return (self.description, *self.wordings)

    @property
    def pairs(self) -> list[Example]:
        return [Example(prompt, answer) for prompt, answer in self.examples]

    @property
    def key(self) -> str:
        """Hash of all fields. The first call takes milliseconds for long examples."""
        return _key_of(self)


def few_shot(description: str, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return pairs as earlier turns of a chat: the description stands before the first prompt."""
    shown = list(pairs)
    if shown:
        prompt, answer = shown[0]
        shown[0] = f"{description}\n{prompt}", answer
    return shown


@functools.lru_cache(maxsize=8)  # a request has up to two megabytes
def _key_of(request: AdapterGenerationRequest) -> str:
    parts = [
        request.description,
        request.wordings,
        request.prompts,
        request.method,
        request.seed,
        request.samples,
        request.force,
        *([request.examples] if request.examples else []),
        *([request.library] if request.library else []),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
