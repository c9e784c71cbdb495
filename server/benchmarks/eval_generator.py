"""Every way to generate an adapter on held-out tasks, with controls and intervals.

python server/benchmarks/eval_generator.py --on validation --rows 16
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from torch import Tensor

    from adapter_store.benchmarks.evaluation.results import Evaluation

_Base = Annotated[str | None, typer.Option(help="Base model; default: the pulled one.")]
_Shipped = Annotated[
    Path | None, typer.Option(help="Folder of the library. Default: the package itself.")
]
_Zoo = Annotated[
    Path | None, typer.Option(help="Folder with the oracles. Default: $LORAPLEX_HOME/zoo.")
]
_CANDIDATES = ("end-to-end", "sg-lora", "icm-lora", "weighted", "nearest", "analogy", "ridge")


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for results.json, tables and plots.")] = Path(
        "docs/generated-adapters"
    ),
    on: Annotated[str, typer.Option(help="`validation` or `test`.")] = "test",
    rows: Annotated[int, typer.Option(help="Examples of each task.", min=4)] = 30,
    seeds: Annotated[int, typer.Option(help="Generator seeds.", min=1)] = 3,
    raw_weights: Annotated[
        bool,
        typer.Option(
            "--raw-weights/--no-raw-weights",
            help="SG-LoRA and ICM-LoRA on raw weights, too; minutes.",
        ),
    ] = False,
    served: Annotated[
        bool,
        typer.Option(
            "--served/--teacher-forced",
            help="Decode through the serving engine, or score in one forward, faster.",
        ),
    ] = True,
    rewrite: Annotated[
        bool,
        typer.Option(
            "--rewrite/--score", help="Only the intervals and pages, from the scores in --out."
        ),
    ] = False,
    kept: Annotated[
        Path | None,
        typer.Option(help="Keep scores in this file, and go on from what it holds."),
    ] = None,
    base: _Base = None,
    shipped: _Shipped = None,
    zoo_folder: _Zoo = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Score every arm on held-out tasks and write the evidence."""
    import contextlib
    import json

    if rewrite:
        _rewrite(out, on)
        return
    import torch
    from rich import print as show
    from transformers import AutoTokenizer

    from adapter_store.benchmarks.evaluation.evaluation import evaluate as run
    from adapter_store.benchmarks.evaluation.evidence import write_evidence
    from adapter_store.benchmarks.evaluation.raw_weights import RawWeightRecipes
    from adapter_store.benchmarks.evaluation.results import best_method
    from loraplex_generation.bundle import Bundle
    from loraplex_generation.frozen_base import FrozenBase
    from loraplex_generation.packing import ChatCodec
    from loraplex_generation.sentences import SentenceEncoder
    from loraplex_generation.shipped import shipped_folder
    from loraplex_generation.taskdata import TaskData
    from loraplex_server.model.pull import loraplex_home, resolve_encoder, resolve_model
    from server.benchmarks.served_scorer import served_scorer

    directory = resolve_model(base)
    folder = shipped or shipped_folder()
    oracles, multi_task = _rivals(zoo_folder or loraplex_home() / "zoo", folder)
    codec = ChatCodec(AutoTokenizer.from_pretrained(directory))
    with contextlib.ExitStack() as running:
        scorer = None
        if served:
            layout = Bundle.load(folder).layout
            scorer = running.enter_context(
                served_scorer(directory, codec, layout, n_threads=threads)
            )
        torch.set_num_threads(threads)
        result: Evaluation = run(
            folder,
            FrozenBase(directory),
            TaskData(codec),
            SentenceEncoder(resolve_encoder()),
            sets=("h1", "h2", "h3") if on == "test" else ("validation",),
            oracles=oracles,
            multi_task=multi_task,
            n_rows=rows,
            n_seeds=seeds,
            raw_weights=RawWeightRecipes() if raw_weights else None,
            scorer=scorer,
            kept=kept,
            report=lambda line: show(line, flush=True),
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{on}.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    write_evidence(result, out, on)
    if on == "validation":
        show(f"best on validation: {best_method(result, _CANDIDATES)}")
    show(f"wrote {out}")


def _rewrite(out: Path, on: str) -> None:
    """Nothing is run; the plots stay, since they show no intervals."""
    import json

    from adapter_store.benchmarks.evaluation.evidence import evidence
    from adapter_store.benchmarks.evaluation.results import Evaluation, differences

    result = Evaluation(**json.loads((out / f"{on}.json").read_text()))
    result.differences = differences(result, f"{result.about['default']} #0")
    (out / f"{on}.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    (out / f"{on}.md").write_text(evidence(result))


def _rivals(zoo_folder: Path, shipped: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    from loraplex_generation.zoo_training import ZooTraining

    zoo = ZooTraining(zoo_folder, shipped)
    return {name: e.mean for name, e in zoo.oracles().items()}, zoo.multi_task()


if __name__ == "__main__":
    typer.run(evaluate)
