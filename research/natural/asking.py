"""The metrics of the natural tasks, what a server answers to their rows, and means over tasks."""

import importlib.util
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

Pair = tuple[str, str]
Metric = Callable[[str, str], float]
_AT_ONCE = 8  # requests
_N_RESAMPLES = 2000


def load_metrics(folder: Path) -> dict[str, Metric]:
    """Return the metrics of the tasks in ``folder``, by name."""
    spec = importlib.util.spec_from_file_location("score", folder / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    metrics: dict[str, Metric] = module.METRICS
    return metrics


def turn(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def replies(
    client: httpx.Client,
    body: dict[str, Any],
    rows: Sequence[Pair],
    head: Sequence[dict[str, str]] = (),
) -> list[str]:
    """Return the greedy answers to the inputs of ``rows``, each after the messages ``head``."""

    def reply(row: Pair) -> str:
        chat = {**body, "messages": [*head, {"role": "user", "content": row[0]}]}
        chat |= {"temperature": 0, "max_tokens": 64}
        answer = client.post("/v1/chat/completions", json=chat)
        if answer.status_code == 400:  # the turns do not fit
            return ""
        text: str = answer.raise_for_status().json()["choices"][0]["message"]["content"]
        return text.strip()

    with ThreadPoolExecutor(_AT_ONCE) as at_once:
        return list(at_once.map(reply, rows))


def mean_score(replies: Sequence[str], rows: Sequence[Pair], metric: Metric) -> float:
    pairs = zip(replies, rows, strict=True)
    return round(sum(metric(reply, row[1]) for reply, row in pairs) / len(rows), 3)


def means(tasks: dict[str, dict[str, float]], categories: dict[str, str]) -> dict[str, Any]:
    """Return of each arm the mean over tasks, and the 95 % interval over categories.

    ``tasks``: the scores of each task, by arm. ``categories``: of each task.
    """
    found: dict[str, Any] = {}
    rng = random.Random(0)
    for arm in dict.fromkeys(arm for task in tasks.values() for arm in task):
        groups: dict[str, list[float]] = {}
        for name, scores in tasks.items():
            if arm in scores:
                groups.setdefault(categories[name], []).append(scores[arm])
        of_arm = [score for group in groups.values() for score in group]
        drawn = []
        for _ in range(_N_RESAMPLES):
            some = [s for g in rng.choices(list(groups.values()), k=len(groups)) for s in g]
            drawn.append(sum(some) / len(some))
        drawn.sort()
        cut = _N_RESAMPLES // 40
        found[arm] = {
            "mean": round(sum(of_arm) / len(of_arm), 3),
            "interval": [round(drawn[cut], 3), round(drawn[-1 - cut], 3)],
            "tasks": len(of_arm),
        }
    return found
