"""Compares the methods that learn classes of images on a CLIP, from a few drawings of each.

    python -m research.few_shot --out research/few_shot/results.json

The base is a small CLIP, pre-trained here on coloured shapes and the digits 0 to 4. Each method
learns the digits 5 to 9 from 1 to 16 drawings of each. ``new`` is the accuracy on other drawings of
them, and ``known`` that on the 41 labels of pre-training, zero-shot through the same adapter: what
it forgot. Both are means over seeds. ``clip-lora-r2`` has the parameters of
Block-LoRA's served LoRA, ``clip-lora-r8`` those of a LoRA of its trained rank.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from loraplex_training.config import BlockShape
from loraplex_training.images.clip_base import ClipBase
from loraplex_training.images.config import ImageShape, ImageTraining
from loraplex_training.images.few_shot import FewShot
from loraplex_training.images.image_folder import LabelledImages, read_folder

from .drawings import KNOWN, NEW, themselves, write_folder
from .drawn_clip import save_drawn_clip

_LR = 1e-2  # a small base needs a larger rate than the default
METHODS = {
    "clip-lora-r2": ImageShape(),
    "clip-lora-r8": ImageShape(rank=8),
    "block-lora": ImageShape("block-lora", rank=8, blocks=BlockShape(4)),
    "block-lora-feature": ImageShape("block-lora", blocks=BlockShape(4, "feature")),
    "comp-lora": ImageShape("comp-lora"),
    "glad": ImageShape("glad"),
}


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_drawn_clip(folder / "base", steps=options.pretraining)
        new = read_folder(write_folder(folder / "new", themselves(NEW), 40, seed=100))
        known = read_folder(write_folder(folder / "known", themselves(KNOWN), 5, seed=101))
        rows = []
        for shots in options.shots:
            for seed in range(options.seeds):
                data = write_folder(folder / f"{shots}-{seed}", themselves(NEW), shots, seed)
                for method in METHODS:
                    rows.append(_run(base, data, method, shots, seed, options.steps, new, known))
                    print(json.dumps(rows[-1]), flush=True)
    settings = {name: getattr(options, name) for name in ("pretraining", "steps", "seeds")}
    options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    print(_table(rows, options.shots))


def _run(
    base: Path,
    data: Path,
    method: str,
    shots: int,
    seed: int,
    steps: int,
    new: LabelledImages,
    known: LabelledImages,
) -> dict[str, Any]:
    config = ImageTraining(
        data, data, base, "drawn-clip", METHODS[method], steps=steps, lr=_LR, seed=seed
    )
    run = FewShot(ClipBase.load(base, "cpu"), read_folder(data), config)
    run.loop()
    accuracies = {"new": run.classify(new), "known": run.classify(known)}
    return {
        "method": method,
        "shots": shots,
        "seed": seed,
        "n_parameters": run.adapter.n_parameters,
        **{name: accuracy.tuned for name, accuracy in accuracies.items()},
        **{f"base_{name}": accuracy.zero_shot for name, accuracy in accuracies.items()},
    }


def _table(rows: list[dict[str, Any]], shots: list[int]) -> str:
    lines = [
        "| method | parameters | " + " | ".join(f"{n} shots: new, known" for n in shots) + " |"
    ]
    lines.append("| --- " * (len(shots) + 2) + "|")
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        cells = [
            ", ".join(
                f"{mean(row[what] for row in own if row['shots'] == n):.2f}"
                for what in ("new", "known")
            )
            for n in shots
        ]
        lines.append(f"| {method} | {own[0]['n_parameters']:,} | {' | '.join(cells)} |")
    base = rows[0]
    zero_shot = f"{base['base_new']:.2f}, {base['base_known']:.2f}"
    lines.append(f"| zero-shot | 0 | {' | '.join([zero_shot] * len(shots))} |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="The file of the results.")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="Of each run.")
    parser.add_argument("--pretraining", type=int, default=600, help="Steps of the base.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
