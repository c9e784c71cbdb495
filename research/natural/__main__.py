"""Scores a server on natural tasks: base, sentence, turns, and adapters from pairs.

    loraplex serve &
    python -m research.natural --data FOLDER --out research/results/natural.json

FOLDER holds a JSON file for each task (``descriptions``, ``train``, ``test``, ``metric``) and
``score.py`` with the metrics.
"""

import argparse
import importlib.util
import json
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

Pair = tuple[str, str]
Metric = Callable[[str, str], float]


def main() -> None:
    options = _options()
    metrics = _metrics(options.data / "score.py")
    results: dict[str, Any] = {"began": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    results["budget_s"] = options.budget
    tasks: dict[str, dict[str, float]] = {}
    results["tasks"] = tasks
    paths = sorted(options.data.glob("*.json"))
    with httpx.Client(base_url=options.url, timeout=600 + options.budget) as client:
        for path in paths:
            task = json.loads(path.read_text())
            if options.tasks and task["name"] not in options.tasks:
                continue
            tasks[task["name"]] = _scores(client, task, metrics[task["metric"]], options)
            print(task["name"], json.dumps(tasks[task["name"]]), flush=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    arms = {arm for task in tasks.values() for arm in task}
    for arm in sorted(arms):
        of_arm = [task[arm] for task in tasks.values() if arm in task]
        print(f"{arm:14} {sum(of_arm) / len(of_arm):.3f}  ({len(of_arm)} tasks)")


def _scores(
    client: httpx.Client, task: dict[str, Any], metric: Metric, options: argparse.Namespace
) -> dict[str, float]:
    rng = random.Random(options.draw)
    train = list(map(tuple, task["train"]))
    if options.draw:
        rng.shuffle(train)
    rows: list[Pair] = list(map(tuple, task["test"]))[: options.rows]
    sentence = task["descriptions"][0]

    def score(body: dict[str, Any], head: Sequence[dict[str, str]] = ()) -> float:
        with ThreadPoolExecutor(8) as at_once:
            replies = at_once.map(lambda row: _reply(client, body, head, row[0]), rows)
            return round(
                sum(metric(reply, row[1]) for reply, row in zip(replies, rows, strict=True))
                / len(rows),
                3,
            )

    scores = {
        "base": score({}),
        "prompt": score({}, [{"role": "system", "content": sentence}]),
        "sentence": score({"adapter": {"description": sentence}}),
    }
    for k in options.pairs:
        head = [
            {"role": role, "content": text}
            for prompt, answer in train[:k]
            for role, text in (("user", prompt), ("assistant", answer))
        ]
        head[0]["content"] = f"{sentence}\n{head[0]['content']}"
        if k <= 16:
            scores[f"turns {k}"] = score({}, head)
        pairs = [{"prompt": prompt, "answer": answer} for prompt, answer in train[:k]]
        name = f"natural-{task['name'].replace('_', '-')}-{k}-{options.draw}"
        budget_s = options.budget * (3 if k > 16 else 1)
        order = {"description": sentence, "examples": pairs, "name": name, "probe": False}
        made = client.post(
            "/v1/adapters/generate", json={**order, "budget_s": budget_s, "wait": True}
        )
        if made.status_code == 201:
            scores[f"learnt {k}"] = score({"adapter": name})
            client.delete(f"/v1/adapters/{name}")
        else:
            print(task["name"], k, made.text[:300])
            scores[f"learnt {k}"] = scores[f"turns {min(k, 16)}"]  # what a chat is answered with
    return scores


def _reply(
    client: httpx.Client, body: dict[str, Any], head: Sequence[dict[str, str]], prompt: str
) -> str:
    chat = {**body, "messages": [*head, {"role": "user", "content": prompt}]}
    answer = client.post("/v1/chat/completions", json={**chat, "temperature": 0, "max_tokens": 64})
    if answer.status_code == 400:  # the turns do not fit
        return ""
    text: str = answer.raise_for_status().json()["choices"][0]["message"]["content"]
    return text.strip()


def _metrics(path: Path) -> dict[str, Metric]:
    spec = importlib.util.spec_from_file_location("score", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    metrics: dict[str, Metric] = module.METRICS
    return metrics


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("research.natural", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Folder of the tasks.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="The server.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the scores.")
    parser.add_argument("--tasks", nargs="*", help="Names of tasks. Default: all.")
    parser.add_argument("--pairs", nargs="*", type=int, default=[16], help="Numbers of pairs.")
    parser.add_argument("--budget", type=float, default=30, help="Seconds for up to 16 pairs.")
    parser.add_argument("--rows", type=int, default=40, help="Rows of the test.")
    parser.add_argument("--draw", type=int, default=0, help="Seed of the pairs; 0: the first ones.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
