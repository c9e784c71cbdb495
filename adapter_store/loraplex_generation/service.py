"""A description in, a plain LoRA out: what the server and the command line call.

description → known? → method → vector in the layout → PEFT config and tensors, with provenance
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .bundle import Bundle
from .description_reader import Reading
from .errors import GeneratorMismatch, NotTrained, OutOfDistribution, UnfitPrompts
from .frozen_base import base_fingerprint
from .layout import AdapterLayout
from .library import Subspace
from .retrieval import condition
from .sentences import Encoded, SentenceEncoder
from .task_vectors import TaskVectors
from .text_map import TextMap

__all__ = ["METHODS", "AdapterDescription", "Draft", "GeneratedAdapter", "Generator"]

_N_READINGS = 10


class AdapterDescription(NamedTuple):
    """A description as the methods read it."""

    wordings: tuple[str, ...]  # the description, and others of the same task
    prompts: tuple[str, ...]  # unlabelled inputs of the task
    encoded: Encoded  # one row per wording: methods average what they read off the rows


class Draft(NamedTuple):
    """An adapter before it is dressed as PEFT."""

    vector: Tensor  # float32 [layout.size]
    parts: Mapping[str, float]  # experts, or factors, and their weights


@dataclass(frozen=True, slots=True)
class GeneratedAdapter:
    """A plain PEFT LoRA, ready for the store, and where it came from (JSON-ready)."""

    config: dict[str, object]
    tensors: dict[str, Tensor]
    card: dict[str, object]
    layout: AdapterLayout
    vector: Tensor  # float32 [layout.size or .full_size]: what the tensors were written from


class Generator:
    """Thread-safe and deterministic: the same description, method and seed give the same bits."""

    def __init__(
        self,
        bundle: Bundle,
        encoder: SentenceEncoder,
        task_vectors: TaskVectors,
        base_name: str,
    ) -> None:
        self._bundle, self._encoder, self._base_name = bundle, encoder, base_name
        self._task_vectors = task_vectors
        self._analogy = bundle.analogy

    @classmethod
    def load(
        cls,
        folder: Path,
        encoder: SentenceEncoder,
        *,
        base_name: str,
        base_directory: Path,
    ) -> Generator:
        """Raises NotTrained, or GeneratorMismatch if it is for another base."""
        bundle = Bundle.load(folder)
        trained_for, served = bundle.library.base_fingerprint, base_fingerprint(base_directory)
        if served != trained_for:
            raise GeneratorMismatch(
                f"the generator was trained for base {trained_for}, not {served}; "
                "run `loraplex zoo train` and `loraplex generator train` for this base"
            )
        return cls(bundle, encoder, TaskVectors.of_directory(base_directory), base_name)

    @property
    def default_method(self) -> str:
        """What `auto` stands for: the text map where there is one, as it knows the most tasks."""
        return self._bundle.default if self._bundle.text_map is None else "text-map"

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that can be asked for, "auto" among them."""
        parts = {"icm-lora": self._bundle.icm, "text-map": self._bundle.text_map}
        return ("auto", *(m for m in METHODS if m not in parts or parts[m] is not None))

    def generate(
        self,
        description: str,
        *,
        wordings: Sequence[str] = (),
        prompts: Sequence[str] = (),
        method: str = "auto",
        seed: int = 0,
        force: bool = False,
        samples: int = 0,
    ) -> GeneratedAdapter:
        """Tens of milliseconds on two cores; a few hundred for ICM-LoRA with prompts.

        `wordings` are further ones of the same task, `prompts` unlabelled inputs of the task,
        which ICM-LoRA alone reads. SG-LoRA and ICM-LoRA decode the centre of their latent, or the
        average of `samples` draws. Raises OutOfDistribution unless `force`, NotTrained for a
        method that was not trained, UnfitPrompts for too few prompts or a method without use
        for them.
        """
        started = time.perf_counter()
        if prompts and method != "icm-lora":
            raise UnfitPrompts(f'method "{method}" has no use for prompts; "icm-lora" has')
        asked = self.read(description, wordings, prompts)
        name = self._named(method)
        score, limit = self.ood_score(asked, name), self._limit(name)
        nearest = self.nearest(asked, name)
        if score > limit and not force:
            raise OutOfDistribution(score, limit, nearest)
        draft = self._average(asked, name, seed, samples)
        layout = self._bundle.layout
        card: dict[str, object] = {
            "description": description,
            "wordings": list(wordings),
            "method": name,
            "asked_method": method,
            "seed": seed,
            "samples": samples,
            "prompts": len(prompts),
            "parts": {k: round(v, 4) for k, v in draft.parts.items()},
            "ood_score": round(score, 4),
            "ood_limit": round(limit, 4),
            "nearest": [[w, round(s, 4)] for w, s in nearest],
            "delta_norm": round(layout.delta_norm(draft.vector), 4),
            "generator": self._digest(name),
            "library": self._bundle.library.digest,
            "base": self._bundle.library.base_fingerprint,
            "milliseconds": round(1000 * (time.perf_counter() - started), 1),
        }
        return self.dressed(draft.vector, card)

    def dressed(self, vector: Tensor, card: dict[str, object]) -> GeneratedAdapter:
        """``vector`` [layout.size or layout.full_size] as a plain PEFT LoRA."""
        layout = self._bundle.layout
        config, tensors = layout.peft(vector, self._base_name)
        return GeneratedAdapter(config, tensors, card, layout, vector)

    @cached_property
    def span(self) -> Subspace:
        """What the adapters of all trained tasks span. Made when examples are learnt first."""
        text_map = self._bundle.text_map
        return self._bundle.subspace if text_map is None else text_map.span()

    def library_mean(self) -> Tensor:
        """float32 [layout.size]: what they have in common."""
        return self.span.mean

    def readings(self, asked: AdapterDescription, method: str) -> dict[str, Draft]:
        """What the description may mean, by name: a text map's adapters for the likeliest contents,
        each alone. No other method has any.
        """
        text_map = self._text_map_of(self._named(method))
        if text_map is None:
            return {}
        found = text_map.readings(asked.encoded, _N_READINGS)
        return {name: _draft_of(text_map, reading) for name, reading in found.items()}

    def draft(
        self, asked: AdapterDescription, method: str, *, seed: int = 0, sample: bool = False
    ) -> Draft:
        """The bare vector of one description. `method` is one of METHODS."""
        if method not in METHODS:
            raise NotTrained(f"method {method!r} is unknown; known: {', '.join(self.methods)}")
        random = torch.Generator().manual_seed(seed) if sample else None
        with torch.inference_mode():
            return METHODS[method](self, asked, random)

    def _average(self, asked: AdapterDescription, method: str, seed: int, samples: int) -> Draft:
        if samples == 0:
            return self.draft(asked, method)
        drafts = [self.draft(asked, method, seed=seed + i, sample=True) for i in range(samples)]
        return Draft(torch.stack([draft.vector for draft in drafts]).mean(0), drafts[0].parts)

    def ood_score(self, asked: AdapterDescription, method: str) -> float:
        """Above the method's limit, a description is refused."""
        text_map = self._text_map_of(method)
        if text_map is not None:
            return float(text_map.reader.scores(asked.encoded).min())
        return float(self._bundle.ood_score.score(asked.encoded.sentence).min())

    def refuses(self, asked: AdapterDescription, method: str = "auto") -> bool:
        name = self._named(method)
        return self.ood_score(asked, name) > self._limit(name)

    def nearest(
        self, asked: AdapterDescription, method: str, n: int = 3
    ) -> list[tuple[str, float]]:
        """Names of the closest tasks that the method was trained on, and how close: their cosine,
        or of the text map the share of what they stand for.
        """
        text_map = self._text_map_of(method)
        if text_map is not None:
            return text_map.nearest(asked.encoded, n)
        similarity = (asked.encoded.sentence @ self._bundle.wordings.T).amax(0)
        best: dict[str, float] = {}
        for i in similarity.argsort(descending=True).tolist():
            best.setdefault(self._bundle.tasks[int(self._bundle.owner[i])], float(similarity[i]))
            if len(best) == n:
                break
        return list(best.items())

    def _named(self, method: str) -> str:
        return self.default_method if method == "auto" else method

    def _text_map_of(self, method: str) -> TextMap | None:
        return self._bundle.text_map if method == "text-map" else None

    def _limit(self, method: str) -> float:
        text_map = self._text_map_of(method)
        return self._bundle.ood_score.limit if text_map is None else text_map.reader.limit

    def _digest(self, method: str) -> str:
        text_map = self._text_map_of(method)
        return self._bundle.digest if text_map is None else text_map.digest

    def read(
        self, description: str, wordings: Sequence[str] = (), prompts: Sequence[str] = ()
    ) -> AdapterDescription:
        texts = (description, *wordings)
        return AdapterDescription(texts, tuple(prompts), self._encoder.encode(texts))

    def _of_weights(self, weights: Tensor) -> Draft:
        library = self._bundle.library
        order = weights.abs().argsort(descending=True)[:8].tolist()
        parts = {library.tasks[i]: float(weights[i]) for i in order if abs(weights[i]) > 1e-3}
        return Draft(library.combine(weights), parts)

    def _sentence(self, asked: AdapterDescription) -> Tensor:
        return torch.nn.functional.normalize(asked.encoded.sentence.mean(0, keepdim=True), dim=-1)

    def _point(self, asked: AdapterDescription) -> Tensor:
        bundle = self._bundle
        return bundle.factors.point(*bundle.head.distributions(asked.encoded)).mean(0)

    def _task_vector(self, asked: AdapterDescription) -> Tensor:
        read = self._task_vectors.of
        return torch.stack([read(wording, asked.prompts) for wording in asked.wordings]).mean(0)


def _end_to_end(
    self: Generator, asked: AdapterDescription, random: torch.Generator | None
) -> Draft:
    point = self._point(asked)
    names = self._bundle.factors.names
    parts = {names[i]: float(point[i]) for i in point.nonzero()[:, 0].tolist() if point[i] > 0.02}
    return Draft(point @ self._bundle.vectors.float(), parts)


def _text_map(self: Generator, asked: AdapterDescription, random: torch.Generator | None) -> Draft:
    text_map = self._bundle.text_map
    if text_map is None:
        raise NotTrained("this library has no text map; run `loraplex generator text-map`")
    return _draft_of(text_map, text_map.read(asked.encoded))


def _draft_of(text_map: TextMap, reading: Reading) -> Draft:
    return Draft(text_map.vector(text_map.point(reading)), text_map.parts(reading))


def _analogy(self: Generator, asked: AdapterDescription, random: torch.Generator | None) -> Draft:
    return self._of_weights(self._point(asked) @ self._analogy)


def _weighted(self: Generator, asked: AdapterDescription, random: torch.Generator | None) -> Draft:
    return self._of_weights(self._bundle.neighbours.weights(self._sentence(asked))[0])


def _top_k(self: Generator, asked: AdapterDescription, random: torch.Generator | None) -> Draft:
    return self._of_weights(self._bundle.neighbours.weights(self._sentence(asked), even=True)[0])


def _nearest(self: Generator, asked: AdapterDescription, random: torch.Generator | None) -> Draft:
    return self._of_weights(self._bundle.neighbours.weights(self._sentence(asked), k=1)[0])


def _uniform(self: Generator, asked: AdapterDescription, random: torch.Generator | None) -> Draft:
    n = len(self._bundle.library.tasks)
    return self._of_weights(torch.full((n,), 1 / n))


def _ridge(self: Generator, asked: AdapterDescription, random: torch.Generator | None) -> Draft:
    t = self._bundle.ridge(self._sentence(asked))[0]
    return self._of_weights(self._bundle.subspace.weights(t))


def _mlp(self: Generator, asked: AdapterDescription, random: torch.Generator | None) -> Draft:
    t = self._bundle.mlp(self._sentence(asked))[0]
    return self._of_weights(self._bundle.subspace.weights(t))


def _sg_lora(self: Generator, asked: AdapterDescription, random: torch.Generator | None) -> Draft:
    bundle = self._bundle
    text = self._sentence(asked)
    alpha = bundle.neighbours.weights(text)
    snapshots = bundle.library.snapshots
    mu, var = condition(alpha, snapshots.mean(1), snapshots.var(1, correction=0))
    t = bundle.sg.generate(mu, var, text, random)[0]
    return self._of_weights(bundle.subspace.weights(t))


def _icm_lora(self: Generator, asked: AdapterDescription, random: torch.Generator | None) -> Draft:
    bundle = self._bundle
    if bundle.icm is None:
        raise NotTrained("ICM-LoRA was left out when this generator was trained")
    t = bundle.icm.generate(self._task_vector(asked)[None], random)[0]
    return self._of_weights(bundle.subspace.weights(t))


METHODS: dict[str, Callable[[Generator, AdapterDescription, torch.Generator | None], Draft]] = {
    "text-map": _text_map,
    "end-to-end": _end_to_end,
    "sg-lora": _sg_lora,
    "icm-lora": _icm_lora,
    "weighted": _weighted,
    "nearest": _nearest,
    "analogy": _analogy,
    "ridge": _ridge,
    "mlp": _mlp,
    "top-k": _top_k,
    "uniform": _uniform,
}
