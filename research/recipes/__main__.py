"""Compares recipes and families of training on eight natural tasks, at equal time.

    loraplex serve --allow-training &
    python -m research.recipes --data FOLDER --out research/recipes/results.json

FOLDER is that of ``research.natural``. Each arm trains on the same pairs of a task, each with the
task's sentence as system turn, through ``POST /v1/adapters/train`` with the same ``budget_s``. The
weights with the lowest loss on the held-out tenth of the pairs answer the test. All arms have rank
8 and the default rate, but for those whose few parameters need a larger one. ``base`` is the base
with the sentence.

OUT is written after each arm, and an arm that it has is not trained again. The table has the mean
score over tasks, its 95 % interval over categories, and the median of the steps.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from loraplex_training.config import FAMILIES, PLAIN, RECIPES
from research.natural.asking import Metric, Pair, load_metrics, mean_score, means, replies, turn

TASKS = (  # one of each category
    *("card_problem", "date_to_iso", "negate_sentence", "review_sentiment"),
    *("sms_spam", "text_to_bash", "voice_intent", "weather_slots"),
)
BASE = "base"
ARMS: dict[str, dict[str, object]] = {
    PLAIN: {},
    **{recipe: {"recipe": recipe} for recipe in sorted(RECIPES)},
    **{family: {"family": family} for family in FAMILIES if family != "lora"},
}
"""The fields of each arm's order."""
_RATES = {"lora-sb": 1e-2, "inttune": 1e-2, "prefix": 1e-2}  # others: the server's default
_STEPS = 10_000  # more than fit the time


def main() -> None:
    options = _options()
    settings = {"budget_s": options.budget, "rows": options.rows, "pairs": options.pairs}
    results: dict[str, Any] = {
        "settings": settings,
        **{part: {} for part in ("categories", "scores", "steps", "failed")},  # by task
    }
    if options.out.exists():
        results = json.loads(options.out.read_text())
        if results["settings"] != settings:
            raise SystemExit(
                f"{options.out} has other settings: {results['settings']}; name another"
            )
    results.setdefault("began", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
    metrics = load_metrics(options.data)
    with httpx.Client(base_url=options.url, timeout=600 + options.budget) as client:
        for name in options.tasks:
            task = json.loads((options.data / f"{name}.json").read_text())
            results["categories"][name] = task["category"]
            for arm in (BASE, *options.arms):
                if arm in results["scores"].get(name, {}):
                    continue
                _run(client, task, arm, metrics[task["metric"]], settings, results)
                results["means"] = means(results["scores"], results["categories"])
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Return the means as a Markdown table, the best first."""
    tasks = results["scores"]
    lines = [f"| | mean of {len(tasks)} tasks | interval | steps | {' | '.join(tasks)} |"]
    lines.append("| --- " * (4 + len(tasks)) + "|")
    for arm, mean in sorted(results["means"].items(), key=lambda item: -item[1]["mean"]):
        low, high = mean["interval"]
        steps = [of_task[arm] for of_task in results["steps"].values() if arm in of_task]
        cells = [f"{tasks[task][arm]:.2f}" if arm in tasks[task] else "–" for task in tasks]
        n_steps = f"{median(steps):.0f}" if steps else ""
        lines.append(
            f"| {arm} | {mean['mean']:.3f} | {low:.2f} to {high:.2f} | {n_steps} | "
            f"{' | '.join(cells)} |"
        )
    for task, errors in results["failed"].items():
        lines += [f"{task}, {arm}: {error}" for arm, error in errors.items()]
    return "\n".join(lines)


def _run(
    client: httpx.Client,
    task: dict[str, Any],
    arm: str,
    metric: Metric,
    settings: dict[str, Any],
    results: dict[str, Any],
) -> None:
    """Train an arm on a task and write its score, or the error, into ``results``."""
    name = task["name"]
    system = {"role": "system", "content": task["descriptions"][0]}
    rows: list[Pair] = list(map(tuple, task["test"]))[: settings["rows"]]
    body: dict[str, Any] = {}
    if arm != BASE:
        chats = [
            {"messages": [system, *turn(*pair)]} for pair in task["train"][: settings["pairs"]]
        ]
        adapter = f"recipes-{name.replace('_', '-')}-{arm}"
        order = {"name": adapter, "examples": chats, "budget_s": settings["budget_s"], **ARMS[arm]}
        order |= {"steps": _STEPS, "replace": True}
        order |= {"lr": _RATES[arm]} if arm in _RATES else {}
        answer = client.post("/v1/adapters/train", json=order)
        if answer.is_error:
            raise SystemExit(f"{name}, {arm}: {answer.text}")
        job = _ended(client, answer.json())
        if job["status"] != "succeeded":
            results["failed"].setdefault(name, {})[arm] = job["error"]["message"]
            print(f"{name}, {arm}: {job['error']['message']}", flush=True)
            return
        results["steps"].setdefault(name, {})[arm] = job["training"]["step"]
        results["failed"].get(name, {}).pop(arm, None)
        body = {"adapter": adapter}
    score = mean_score(replies(client, body, rows, [system]), rows, metric)
    results["scores"].setdefault(name, {})[arm] = score
    print(f"{name}, {arm}: {score:.3f}", flush=True)
    if arm != BASE:
        client.delete(f"/v1/adapters/{adapter}").raise_for_status()


def _ended(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """Follow a job to its end and return its last state."""
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
        for line in events.iter_lines():
            if line.startswith("data: {"):
                job = json.loads(line.removeprefix("data: "))
    return job


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("research.recipes", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Folder of the tasks.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="The server.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the scores.")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), help="Names of tasks.")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--budget", type=float, default=30, help="Seconds of each training.")
    parser.add_argument("--pairs", type=int, default=64, help="Pairs of each training.")
    parser.add_argument("--rows", type=int, default=40, help="Rows of each test.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
