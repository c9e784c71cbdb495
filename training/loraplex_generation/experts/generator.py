"""Makes adapters from the adapters of a store, by SG-LoRA and ICM-LoRA.

description ─► embedding ─► weights of experts ─► Σ w_k ΔW_k ─► PEFT config and tensors

Without a fitted CVAE, ``sg-lora`` is the semantic mixture alone: softmax over the nearest
descriptions, of adapters that the store holds now. The card calls it "sg-lora mixture".
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from loraplex_generation.errors import NotTrained, OutOfDistribution, UnfitExpert, UnfitPrompts
from loraplex_generation.generated import GeneratedAdapter
from loraplex_generation.request import AdapterGenerationRequest

from .embeddings import Encode
from .expert import Expert, fewest, gram_of, weighted_sum
from .fitted import FittedExperts
from .icm_lora import MIN_PROMPTS
from .neighbours import Neighbours

STORE_METHODS = ("sg-lora", "icm-lora")
LIMIT = 0.5  # of 1 − cosine to the nearest description; above it, a description is refused
MIXTURE = Neighbours()  # of an unfitted library
_N_READ = 16  # adapters that are read until enough of one form are found
_MAX_RANK = 256  # of a generated adapter


class Candidate(NamedTuple):
    """An adapter of the store that may be an expert."""

    name: str
    description: str
    read: Callable[[], Expert]  # raises UnfitExpert; may block for a read from disk


class Mixed(NamedTuple):
    """The experts of an adapter with their weights, and the inner products of their ΔW."""

    experts: list[Expert]
    weights: list[float]
    gram: Tensor  # float64 [n, n]


class ExpertGenerator:
    """Generates adapters from experts: equal experts and requests give equal bits. Thread-safe."""

    def __init__(self, base_name: str, task_type: str | None = "CAUSAL_LM") -> None:
        """``task_type``: PEFT's, of the adapters that are made; None: the base writes no text."""
        self._base_name, self._task_type = base_name, task_type

    def generate(
        self,
        request: AdapterGenerationRequest,
        candidates: Sequence[Candidate],
        fitted: FittedExperts | None,
        encode: Encode,
        task: Tensor | None = None,
    ) -> GeneratedAdapter:
        """Return an adapter made of the candidates or, if there is one, of the fitted library.

        ``encode`` embeds the request's texts and the candidates' descriptions. ``task``: the task
        vector [hidden_size], for ``icm-lora``. Takes tens of milliseconds for each expert. Raises
        OutOfDistribution unless ``force`` is set, NotTrained, UnfitExpert and UnfitPrompts.
        """
        started = time.perf_counter()
        if request.prompts and request.method != "icm-lora":
            raise UnfitPrompts(f'method "{request.method}" has no use for prompts; "icm-lora" has')
        if request.method == "icm-lora" and fitted is None:
            raise NotTrained(
                'method "icm-lora" is fitted to adapters first: run `loraplex generator train '
                "--from-store --out FOLDER` and serve with --generator-dir FOLDER"
            )
        if fitted is None and not candidates:
            raise NotTrained(
                f'method "{request.method}" mixes adapters that have a description, and there are '
                "none; add plain LoRAs with descriptions"
            )
        sentence = normalize(encode(request.texts).mean(0), dim=0)
        if fitted is None:
            names = [each.name for each in candidates]
            similarities = encode([each.description for each in candidates]) @ sentence
        else:
            names, similarities = list(fitted.names), fitted.embeddings @ sentence
        order = similarities.argsort(descending=True, stable=True).tolist()
        nearest = [(names[i], round(float(similarities[i]), 4)) for i in order[:3]]
        score = 1 - nearest[0][1]
        if score > LIMIT and not request.force:
            raise OutOfDistribution(score, LIMIT, nearest)
        if fitted is None:
            mixed = _mixture([candidates[i] for i in order], similarities[order])
        else:
            mixed = _decoded(fitted, request, sentence, task)
        config, tensors = weighted_sum(
            mixed.experts, mixed.weights, self._base_name, self._task_type
        )
        weights = torch.tensor(mixed.weights, dtype=torch.float64)
        card: dict[str, object] = {
            "description": request.description,
            "wordings": list(request.wordings),
            "method": request.method if fitted else "sg-lora mixture",
            "asked_method": request.method,
            "seed": request.seed,
            "samples": request.samples,
            "prompts": len(request.prompts),
            "parts": {
                expert.name: round(weight, 4)
                for expert, weight in zip(mixed.experts, mixed.weights, strict=True)
            },
            "ood_score": round(score, 4),
            "ood_limit": LIMIT,
            "nearest": [list(pair) for pair in nearest],
            "delta_norm": round(float(weights @ mixed.gram @ weights) ** 0.5, 4),
            **({"generator": fitted.digest} if fitted else {}),
            "milliseconds": round(1000 * (time.perf_counter() - started), 1),
        }
        return GeneratedAdapter(config, tensors, card)


def _mixture(candidates: Sequence[Candidate], similarities: Tensor) -> Mixed:
    """Mix the nearest candidates, in order of distance, that have the form of the nearest one."""
    experts: list[Expert] = []
    kept: list[int] = []
    refusal: UnfitExpert | None = None
    for i, candidate in enumerate(candidates[:_N_READ]):
        try:
            expert = candidate.read()
        except UnfitExpert as error:
            refusal = refusal or error
            continue
        if not experts or expert.form == experts[0].form:
            experts.append(expert)
            kept.append(i)
        if len(experts) == MIXTURE.k:
            break
    if not experts:
        assert refusal is not None
        raise refusal
    weights = MIXTURE.weights(similarities[kept][None])[0].tolist()
    return Mixed(experts, weights, gram_of(experts))


def _decoded(
    fitted: FittedExperts,
    request: AdapterGenerationRequest,
    sentence: Tensor,
    task: Tensor | None,
) -> Mixed:
    def draw(random: torch.Generator | None) -> Tensor:
        if request.method == "sg-lora":
            return fitted.sg_lora(sentence, random)
        if task is None:
            raise UnfitPrompts(
                f"{request.method} reads states of the base, which this request has none of; send "
                f"a description, or {MIN_PROMPTS} prompts with it, and no examples"
            )
        return fitted.icm_lora(task, random)

    seeds = range(request.seed, request.seed + request.samples)
    draws = [draw(torch.Generator().manual_seed(seed)) for seed in seeds] or [draw(None)]
    weights = torch.stack(draws).mean(0)
    rank = fitted.form[0][2]
    kept, fewer = fewest(weights, fitted.gram, max(1, _MAX_RANK // rank))
    return Mixed([fitted.expert(i) for i in kept], fewer, fitted.gram[kept][:, kept])
