"""The evaluation as people read it: Markdown tables and two plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .evaluation import Evaluation, mean_over

__all__ = ["write_evidence"]

_MAIN = (
    "base",
    "base + description",
    "nearest",
    "weighted",
    "sg-lora",
    "icm-lora",
    "end-to-end",
    "oracle",
)


def write_evidence(result: Evaluation, folder: Path, name: str) -> None:
    """`name`.md with every arm and every task, and `name`-*.svg where matplotlib is installed."""
    parts = [_arms_table(result), _differences_table(result), _tasks_table(result)]
    (folder / f"{name}.md").write_text("\n\n".join(parts) + "\n")
    _plot(result, folder, name)


def _arms_table(result: Evaluation) -> str:
    sets = sorted(set(result.tasks.values()))
    head = ["arm", *[f"{s} {m}" for s in sets for m in ("exact", "NLL", "ρ")], "neutral ppl"]
    rows = []
    for arm in result.scores:
        cells = []
        for s in sets:
            cells.append(f"{mean_over(result, arm, 'exact', s):.0%}")
            cells.append(f"{mean_over(result, arm, 'nll', s):.2f}")
            cells.append(f"{mean_over(result, arm, 'rho', s):.2f}")
        ppl = result.neutral.get(arm, math.nan)
        rows.append([arm, *cells, "" if math.isnan(ppl) else f"{ppl:.1f}"])
    return "## Every arm, mean over the tasks of a set\n\n" + _table(head, rows)


def _differences_table(result: Evaluation) -> str:
    head = ["against", "set and metric", "mean difference", "95 % interval"]
    rows = [
        [rival, of, f"{gap['mean']:+.3f}", f"{gap['low']:+.3f} … {gap['high']:+.3f}"]
        for rival, gaps in result.differences.items()
        for of, gap in gaps.items()
    ]
    title = f"## {result.about.get('default', '')} against its rivals, paired over tasks"
    return f"{title}\n\nAbove zero is better, for NLL too.\n\n" + _table(head, rows)


def _tasks_table(result: Evaluation) -> str:
    arms = _present(result)
    head = ["task", "set", *arms]
    rows = []
    for task, of in result.tasks.items():
        cells = [
            f"{result.scores[arm][task]['exact']:.0%} ({result.scores[arm][task]['nll']:.2f})"
            for arm in arms
        ]
        rows.append([f"`{task}`", of, *cells])
    return "## Every task: exact match (NLL)\n\n" + _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *["| " + " | ".join(row) + " |" for row in rows]])


def _present(result: Evaluation) -> list[str]:
    """The main arms under the names they were scored by; a seeded arm by its first seed."""
    names = [n if n in result.scores else f"{n} #0" for n in _MAIN]
    return [n for n in names if n in result.scores]


def _plot(result: Evaluation, folder: Path, name: str) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:  # the extra `load` brings it
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    arms, sets = _present(result), sorted(set(result.tasks.values()))
    for metric, title in (("exact", "exact match"), ("rho", "recovery ρ of the oracle's gain")):
        figure, axes = pyplot.subplots(figsize=(8, 3.6))
        width = 0.8 / len(arms)
        for i, arm in enumerate(arms):
            heights = [mean_over(result, arm, metric, s) for s in sets]
            at = [x + i * width for x in range(len(sets))]
            axes.bar(at, heights, width, label=arm)
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(sets))], sets)
        axes.set_ylabel(title)
        axes.set_ylim(max(-1.0, axes.get_ylim()[0]), None)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.legend(fontsize=7, ncols=2)
        figure.tight_layout()
        figure.savefig(folder / f"{name}-{metric}.svg", metadata={"Date": None})
        pyplot.close(figure)
