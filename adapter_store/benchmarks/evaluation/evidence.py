"""The evaluation as people read it: Markdown tables and two plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .results import GUARDED, Evaluation, mean_over

__all__ = ["evidence", "write_evidence"]

_MAIN = (
    "base",
    "base + description",
    "multi-task + description",
    "nearest",
    "weighted",
    "sg-lora",
    "icm-lora",
    "end-to-end",
    "oracle",
)


def write_evidence(result: Evaluation, folder: Path, name: str) -> None:
    """`name`.md with every method and every task, and `name`-*.svg if matplotlib is there."""
    (folder / f"{name}.md").write_text(evidence(result))
    _plot(result, folder, name)


def evidence(result: Evaluation) -> str:
    """Markdown."""
    tables = [
        _arms_table(result),
        _guard_table(result),
        _differences_table(result),
        _tasks_table(result),
    ]
    return "\n\n".join([_about(result), *_verdict(result), *tables]) + "\n"


def _about(result: Evaluation) -> str:
    about = result.about
    alone, experts = about["library_trained_alone"], about["library_experts"]
    lines = [
        f"Library: {experts} experts, {alone} of them trained on their own after the joint stage, "
        f"{experts - alone} as the joint stage ({about['joint_steps']} steps) left them.",
        f"{about['n_rows']} examples a task; generators trained with {about['generator_seeds']} "
        f"seeds; `auto` stands for {about['default']}.",
    ]
    lines += _how_scored(result)
    if about["library_dropped"]:
        lines.append(f"Dropped by the gate: {', '.join(about['library_dropped'])}.")
    if about["without_oracle"]:
        lines.append(f"No oracle, so no ρ, for: {', '.join(about['without_oracle'])}.")
    beaten = _beaten_oracles(result)
    if beaten:
        lines.append(f"Oracles that {about['default']} beats in NLL: {', '.join(beaten)}.")
    return "\n".join(lines)


def _beaten_oracles(result: Evaluation) -> list[str]:
    """Those that are no upper bound."""
    focus = _scored_as(result, str(result.about["default"]))
    if focus is None:
        return []
    mine, theirs = result.scores[focus], result.scores.get("oracle", {})
    return [task for task in theirs if mine[task]["nll"] < theirs[task]["nll"]]


def _how_scored(result: Evaluation) -> list[str]:
    if not result.about["served"]:
        return ["Exact match and NLL come from one teacher-forced forward."]
    lines = [
        "Exact match is greedy decoding through the serving engine, NLL its prompt "
        "log-probabilities; neutral perplexity and the best expert's choice are "
        "teacher-forced in the training's forward."
    ]
    for arm, found in result.about["agreement"].items():
        lines.append(
            f"{arm}: decoding and the teacher-forced forward agree on {found['exact']:.1%} of the "
            f"answers, NLL of a task at most {found['largest_nll_gap']:.3f} apart."
        )
    return lines


def _verdict(result: Evaluation) -> list[str]:
    """The success criteria of docs/generated-adapters-method.md, each with its number."""
    focus = _scored_as(result, str(result.about["default"]))
    if "oracle" not in result.scores or focus is None:
        return []
    rows: list[list[str]] = []

    def rule(text: str, value: str, met: bool) -> None:
        rows.append([text, value, "met" if met else "**not met**"])

    if "h1" in result.tasks.values():
        rho = mean_over(result, focus, "rho", "h1")
        of_h1 = [task for task, of in result.tasks.items() if of == "h1"]
        n = sum(task in result.scores["oracle"] for task in of_h1)
        text = f"H1 recovery ρ ≥ 0.8, over the {n} of {len(of_h1)} tasks that have an oracle"
        rule(text, f"{rho:.2f}", rho >= 0.8)
        with_oracle = result.scores["oracle"]
        exact, oracle = (
            sum(result.scores[arm][t]["exact"] for t in with_oracle if result.tasks[t] == "h1")
            / max(1, sum(result.tasks[t] == "h1" for t in with_oracle))
            for arm in (focus, "oracle")
        )
        text = "H1 exact match at least half the oracle's, where there is one"
        rule(text, f"{exact:.0%} of {oracle:.0%}", exact >= oracle / 2)
        for rival in ("base", "base + description", "control: wrong description"):
            for metric in ("nll", "exact"):
                gap = result.differences[rival][f"h1 {metric}"]
                value = f"{gap['mean']:+.2f} ({gap['low']:+.2f} … {gap['high']:+.2f})"
                rule(f"H1 {metric} better than {rival}", value, gap["low"] > 0)
    if "h2" in result.tasks.values() and focus != "weighted":
        mine, theirs = (mean_over(result, arm, "nll", "h2") for arm in (focus, "weighted"))
        rule("H2 NLL not worse than weighted", f"{mine:.2f} against {theirs:.2f}", mine <= theirs)
    if "h3" in result.tasks.values():
        mine, theirs = (mean_over(result, arm, "nll", "h3") for arm in (focus, "base"))
        text = "H3 NLL no worse than the base by 2 %, were the guard overridden"
        rule(text, f"{mine:.2f} against {theirs:.2f}", mine <= 1.02 * theirs)
        mine = mean_over(result, GUARDED, "nll", "h3")
        text = "H3 NLL no worse than the base by 2 %, the base answering what the guard refuses"
        rule(text, f"{mine:.2f} against {theirs:.2f}", mine <= 1.02 * theirs)
    if not rows:  # validation tasks have none
        return []
    return ["## The criteria\n\n" + _table(["criterion", "measured", ""], rows)]


def _scored_as(result: Evaluation, method: str) -> str | None:
    """The arm of a method: itself, or its first seed."""
    return next((a for a in (method, f"{method} #0") if a in result.scores), None)


def _arms_table(result: Evaluation) -> str:
    sets = sorted(set(result.tasks.values()))
    head = ["method", *[f"{s} {m}" for s in sets for m in ("exact", "NLL", "ρ")]]
    head += ["neutral ppl", "intruders of ten"]
    rows = []
    for arm in result.scores:
        cells = []
        for s in sets:
            for metric, form in (("exact", ".0%"), ("nll", ".2f"), ("rho", ".2f")):
                cells.append(_number(mean_over(result, arm, metric, s), form))
        cells.append(_number(result.neutral.get(arm, math.nan), ".1f"))
        cells.append(_number(result.intruders.get(arm, math.nan), ".2f"))
        rows.append([arm, *cells])
    return "## Every method, mean over the tasks of a set\n\n" + _table(head, rows)


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _differences_table(result: Evaluation) -> str:
    head = ["against", "set and metric", "mean difference", "95 % interval"]
    rows = [
        [rival, of, f"{gap['mean']:+.3f}", f"{gap['low']:+.3f} … {gap['high']:+.3f}"]
        for rival, gaps in result.differences.items()
        for of, gap in gaps.items()
    ]
    title = f"## {result.about.get('default', '')} against its rivals, paired over tasks"
    about = "Above zero is better, for NLL too. Tasks of one operation are one cluster."
    return f"{title}\n\n{about}\n\n" + _table(head, rows)


def _tasks_table(result: Evaluation) -> str:
    arms = _present(result)
    head = ["task", "set", *arms]
    rows = []
    for task, of in result.tasks.items():
        found = [result.scores[arm].get(task) for arm in arms]
        cells = ["" if s is None else f"{s['exact']:.0%} ({s['nll']:.2f})" for s in found]
        rows.append([f"`{task}`", of, *cells])
    return "## Every task: exact match (NLL)\n\n" + _table(head, rows)


def _guard_table(result: Evaluation) -> str:
    """What the guard does with every test wording, not with the scored one alone."""
    shares = result.about["refused_wordings"]
    rows = []
    for s in sorted(set(result.tasks.values())):
        of = {task: shares[task] for task, of in result.tasks.items() if of == s}
        worst = ", ".join(f"`{task}` {share:.0%}" for task, share in of.items() if share)
        rows.append([s, f"{sum(of.values()) / len(of):.0%}", worst])
    head = ["set", "wordings refused", "of which tasks"]
    return "## The guard\n\n" + _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *["| " + " | ".join(row) + " |" for row in rows]])


def _present(result: Evaluation) -> list[str]:
    """The main arms under the names they were scored by; a seeded arm by its first seed."""
    return [arm for name in _MAIN if (arm := _scored_as(result, name)) is not None]


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
