"""Compares SG-LoRA on a CLIP with its experts, for classes that only a description names.

    python -m research.few_shot.described --out research/few_shot/described.json

The setting is the paper's. Each expert has learnt the six shapes of one colour from drawings. The
sixth colour has a description and no drawing: SG-LoRA mixes the other five experts by their
descriptions, which the CLIP itself embeds. Each colour is left out once. The arms are:

base       the CLIP, zero-shot
nearest    the expert with the nearest description
mixture    the semantic mixture of the experts
sg-lora    the centre of the CVAE that is fitted to the experts
own        a LoRA that has learnt from drawings of the colour: what a description cannot reach

The score is the share of right answers among the six shapes, on other drawings.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor
from transformers import CLIPModel

from loraplex_generation.experts.expert import Expert, Factors
from loraplex_generation.experts.fitted import FittedExperts
from loraplex_generation.experts.generator import Candidate, ExpertGenerator
from loraplex_generation.experts.tower_sentences import tower_sentences
from loraplex_generation.request import AdapterGenerationRequest
from loraplex_training.images.clip_base import ClipBase
from loraplex_training.images.config import TEMPLATE, ImageShape, ImageTraining
from loraplex_training.images.few_shot import FewShot
from loraplex_training.images.image_folder import LabelledImages, read_folder

from .drawings import COLOURS, SHAPES, themselves, write_folder
from .drawn_clip import save_drawn_clip

ARMS = ("base", "nearest", "mixture", "sg-lora", "own")
_N_TEST = 20  # drawings of each label


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_drawn_clip(folder / "base", steps=options.pretraining)
        tests: dict[str, LabelledImages] = {}
        experts: dict[str, Expert] = {}
        scores: dict[str, dict[str, float]] = {}
        for index, colour in enumerate(COLOURS):
            labels = themselves([f"{colour} {shape}" for shape in SHAPES])
            data = write_folder(folder / f"{colour}-train", labels, options.shots, index)
            test = write_folder(folder / f"{colour}-test", labels, _N_TEST, 100 + index)
            tests[colour] = read_folder(test)
            experts[colour], scores[colour] = _learn(base, data, colour, options, tests[colour])
        descriptions = [expert.description for expert in experts.values()]
        embeddings = dict(zip(descriptions, tower_sentences(base, descriptions), strict=True))
        for colour, of_colour in scores.items():
            others = [expert for name, expert in experts.items() if name != colour]
            of_colour |= _described(
                base, experts[colour].description, others, embeddings, tests[colour]
            )
            print(json.dumps({colour: of_colour}), flush=True)
    settings = {name: getattr(options, name) for name in ("pretraining", "steps", "shots", "lr")}
    options.out.write_text(json.dumps({"settings": settings, "scores": scores}, indent=1) + "\n")
    for arm in ARMS:
        shares = [of_colour[arm] for of_colour in scores.values()]
        error = stdev(shares) / len(shares) ** 0.5
        print(f"{arm:8} {mean(shares):.2f} (standard error {error:.2f})")


def _learn(
    base: Path, data: Path, colour: str, options: argparse.Namespace, test: LabelledImages
) -> tuple[Expert, dict[str, float]]:
    """Return the expert of a colour, and the scores ``base`` and ``own`` on its test."""
    config = ImageTraining(
        data, data, base, "drawn-clip", ImageShape(), steps=options.steps, lr=options.lr
    )
    run = FewShot(ClipBase.load(base, "cpu"), read_folder(data), config)
    run.loop()
    scale = run.adapter.shape.scale
    factors = {
        path: Factors(a.detach(), scale * b.detach())
        for path, (a, b) in sorted(run.adapter.factors.items())
    }
    score = run.classify(test)
    expert = Expert(colour, TEMPLATE.format(colour), factors)
    return expert, {"base": round(score.zero_shot, 3), "own": round(score.tuned, 3)}


def _described(
    base: Path,
    description: str,
    experts: Sequence[Expert],
    embeddings: Mapping[str, Tensor],
    test: LabelledImages,
) -> dict[str, float]:
    """Return the scores of the arms that know of a colour by its description alone.

    ``embeddings``: of all descriptions.
    """

    def encode(texts: Sequence[str]) -> Tensor:
        return torch.stack([embeddings[text] for text in texts])

    described = encode([expert.description for expert in experts])
    nearest = experts[int((described @ embeddings[description]).argmax())]
    fitted = FittedExperts.fit(experts, described, "drawn-clip", by_base=True)
    request = AdapterGenerationRequest(description, method="sg-lora", force=True)
    generator = ExpertGenerator("drawn-clip", None)
    scores = {}
    for arm, known, library in (
        ("nearest", [nearest], None),
        ("mixture", experts, None),
        ("sg-lora", experts, fitted),
    ):
        candidates = [
            Candidate(each.name, each.description, partial(_itself, each)) for each in known
        ]
        made = generator.generate(request, candidates, library, encode)
        scores[arm] = round(_score(base, made.tensors, test), 3)
    return scores


def _score(base: Path, tensors: Mapping[str, Tensor], test: LabelledImages) -> float:
    """Return the share of right answers of the base with a LoRA of scale 1 in its weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(base, Path(name) / "base"))
        model = CLIPModel.from_pretrained(base, dtype=torch.float32)
        for key, a in tensors.items():
            if key.endswith(".lora_A.weight"):
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                model.get_submodule(path).weight.data += tensors[key.replace("_A.", "_B.")] @ a
        model.save_pretrained(folder)
        clip = ClipBase.load(folder, "cpu")
    prompts = clip.tokens([TEMPLATE.format(label) for label in test.labels])
    best = clip.logits(clip.pixels([file for file, _ in test.images]), prompts).argmax(-1)
    return float((best == torch.tensor([label for _, label in test.images])).float().mean())


def _itself(expert: Expert) -> Expert:
    return expert


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="The file of the results.")
    parser.add_argument("--shots", type=int, default=16, help="Drawings of each label.")
    parser.add_argument("--steps", type=int, default=200, help="Of each expert.")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--pretraining", type=int, default=300, help="Steps of the base.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
