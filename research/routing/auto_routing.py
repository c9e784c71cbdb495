"""How well ``auto`` does on the shipped adapters: right, abstained, wrong, and how fast.

    python -m research.routing.auto_routing [--out docs/routing]

Every adapter is asked for by prompts that neither its training nor its card has; everyday prompts
(``unrelated.json``, none of them among those the router is calibrated with) ask for no adapter.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from loraplex_router.adapters.auto_router import AdapterProfile
from loraplex_server.adapters.resolving.semantic_router import SemanticRouter
from loraplex_server.adapters.resolving.sentence_encoder import SharedEncoder
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.model.loading.pull import resolve_encoder
from research.demos import DEMOS, held_out_pairs
from research.zoo.chores import CHORES, chats

BASE = "(base)"  # the column of texts that no adapter was chosen for
_SYSTEM = ("Speak like a pirate.", "You are a salty pirate of the seven seas.", "Use pirate slang.")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``confusion[asked][chosen]`` counts prompts; BASE stands for no adapter, in both places."""

    confusion: Mapping[str, Mapping[str, int]]
    threshold: float
    expected_right: float  # the router's own leave-one-out estimate
    latency_ms: Mapping[str, float]  # p50 and p95 of one text, not remembered, nothing else running

    @property
    def n_asked(self) -> int:
        return sum(sum(row.values()) for asked, row in self.confusion.items() if asked != BASE)

    @property
    def right(self) -> float:
        """Share of adapters' prompts that were given to their adapter."""
        hits = (row.get(asked, 0) for asked, row in self.confusion.items() if asked != BASE)
        return sum(hits) / max(1, self.n_asked)

    @property
    def abstained(self) -> float:
        """Share of adapters' prompts that were left to the base."""
        left = (row.get(BASE, 0) for asked, row in self.confusion.items() if asked != BASE)
        return sum(left) / max(1, self.n_asked)

    @property
    def false_picks(self) -> float:
        """Share of unrelated prompts that were given to any adapter."""
        row = self.confusion[BASE]
        return 1.0 - row.get(BASE, 0) / sum(row.values())

    def to_json(self) -> dict[str, object]:
        return {
            "right": round(self.right, 4),
            "abstained": round(self.abstained, 4),
            "wrong_adapter": round(1.0 - self.right - self.abstained, 4),
            "false_picks": round(self.false_picks, 4),
            "n_prompts": self.n_asked,
            "n_unrelated": sum(self.confusion[BASE].values()),
            "threshold": round(self.threshold, 4),
            "expected_right": round(self.expected_right, 4),
            "latency_ms": {key: round(value, 2) for key, value in self.latency_ms.items()},
            "confusion": {asked: dict(row) for asked, row in self.confusion.items()},
        }


def shipped_profiles(folder: Path) -> list[AdapterProfile]:
    """Of every adapter below ``folder``, as its card describes it."""
    profiles = []
    for path in sorted(folder.glob("*/card.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        examples = tuple(card.get("examples", ()))
        for_tools = card.get("defaults", {}).get("auto") == "with_tools"
        profile = AdapterProfile(path.parent.name, card.get("description"), examples, for_tools)
        profiles.append(profile)
    return profiles


def held_out_prompts(name: str, n: int) -> list[str]:
    """Prompts of a shipped adapter that it never saw; empty if its data are not known here."""
    if name == "pirate":  # asked for by style, in the system message
        pairs = held_out_pairs(DEMOS[name], n)
        return [f"{_SYSTEM[i % len(_SYSTEM)]}\n{pair.prompt}" for i, pair in enumerate(pairs)]
    if name in DEMOS:
        return [pair.prompt for pair in held_out_pairs(DEMOS[name], n)]
    tasks = {"chores": CHORES, "clock-12h": ("clock/plain",)}.get(name, ())
    each = -(-n // max(1, len(tasks)))
    return [chat["messages"][0]["content"] for chat in chats(tasks, "test", each)]


def evaluate(router: SemanticRouter, names: Sequence[str], *, n: int = 40) -> Evaluation:
    """``names``: the adapters the router knows, but for those that only requests with tools get."""
    asked = {name: held_out_prompts(name, n) for name in names}
    asked[BASE] = json.loads(Path(__file__).with_name("unrelated.json").read_text("utf-8"))
    return asyncio.run(_evaluate(router, asked))


def plot(evaluation: Evaluation, target: Path) -> None:
    """The confusion matrix as a picture. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = list(evaluation.confusion)
    rows = [[evaluation.confusion[asked].get(chosen, 0) for chosen in names] for asked in names]
    figure, axes = pyplot.subplots(figsize=(1.5 + 0.62 * len(names), 1.2 + 0.62 * len(names)))
    shares = [[value / max(1, sum(row)) for value in row] for row in rows]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value:
                colour = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j, i, str(value), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("chosen")
    axes.set_ylabel("asked for")
    axes.set_title(
        f"{evaluation.right:.1%} right, {evaluation.abstained:.1%} left to the base, "
        f"{evaluation.false_picks:.1%} false picks",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


async def _evaluate(router: SemanticRouter, asked: Mapping[str, Sequence[str]]) -> Evaluation:
    await router.choose("Hello")  # fits the router
    confusion: dict[str, dict[str, int]] = {}
    times = []
    for name, prompts in asked.items():
        row: dict[str, int] = {}
        for prompt in prompts:
            started = time.perf_counter()
            decision = await router.choose(prompt)
            times.append(1000 * (time.perf_counter() - started))
            chosen = decision.adapter or BASE
            row[chosen] = row.get(chosen, 0) + 1
        confusion[name] = row
    calibration = router.calibration
    times.sort()
    return Evaluation(
        confusion=confusion,
        threshold=0.0 if calibration is None else calibration.threshold,
        expected_right=0.0 if calibration is None else calibration.right,
        latency_ms={"p50": statistics.median(times), "p95": times[int(0.95 * len(times))]},
    )


def _show(evaluation: Evaluation) -> None:
    for asked, row in evaluation.confusion.items():
        total, left = sum(row.values()), row.get(BASE, 0)
        others = ", ".join(f"{k} {v}" for k, v in row.items() if k not in (asked, BASE))
        print(f"{asked:20} {row.get(asked, 0) / total:4.0%} of {total}, base {left}  {others}")
    print(
        f"right {evaluation.right:.1%}, left to the base {evaluation.abstained:.1%}, "
        f"false picks {evaluation.false_picks:.1%}; "
        f"p50 {evaluation.latency_ms['p50']:.1f} ms, p95 {evaluation.latency_ms['p95']:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=Path, help="folder of adapters with cards")
    parser.add_argument("-n", type=int, default=40, help="held-out prompts of each adapter")
    parser.add_argument("--out", type=Path, help="write auto.json and auto.png here")
    options = parser.parse_args()
    with as_file(files("loraplex_adapter_store") / "demos") as shipped:
        profiles = shipped_profiles(options.adapters or Path(shipped))
    names = [p.name for p in profiles if not p.for_tools and held_out_prompts(p.name, 1)]
    pools = WorkerPools()
    router = SemanticRouter(
        SharedEncoder(resolve_encoder), lambda: profiles, pools.routing, pools.encoder
    )
    try:
        result = evaluate(router, names, n=options.n)
    finally:
        pools.close()
    _show(result)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "auto.json").write_text(json.dumps(result.to_json(), indent=1) + "\n")
        plot(result, options.out / "auto.png")


if __name__ == "__main__":
    main()
