"""Scores a server on natural tasks: base, sentence, turns, and adapters from pairs.

    loraplex serve --allow-training &
    python -m research.natural --data FOLDER --out research/natural/results.json

FOLDER holds a JSON file for each task (``category``, ``descriptions``, ``train``, ``test``,
``metric``) and ``score.py`` with the metrics. The arms are:

constant   the commonest answer of the pairs, whatever is asked
base       the base without a word about the task
prompt     the base with the sentence as its system turn
sentence   an adapter from the sentence alone
turns K    the base with K pairs as earlier turns
learnt K   the adapter that learns from K pairs
train K    ``POST /v1/adapters/train`` on the same pairs in the same time, with ``--train``

``keys`` is the share of answers from the sentence alone that are JSON with keys that it names.
Intervals resample categories of tasks (a clustered bootstrap), since tasks of one are alike.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from .asking import Metric, Pair, load_metrics, mean_score, means, replies, turn


def main() -> None:
    options = _options()
    metrics = load_metrics(options.data)
    results: dict[str, Any] = {"began": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    results.update(budget_s=options.budget, rows=options.rows, draw=options.draw)
    kept = json.loads(options.out.read_text())["tasks"] if options.again else {}
    tasks: dict[str, dict[str, float]] = {}
    categories: dict[str, str] = {}
    results["tasks"] = tasks
    paths = sorted(options.data.glob("*.json"))
    with httpx.Client(base_url=options.url, timeout=600 + options.budget) as client:
        for path in paths:
            task = json.loads(path.read_text())
            if options.tasks and task["name"] not in options.tasks:
                continue
            categories[task["name"]] = task["category"]
            scores = kept.get(task["name"], {})
            tasks[task["name"]] = _scores(client, task, metrics[task["metric"]], options, scores)
            print(task["name"], json.dumps(tasks[task["name"]]), flush=True)
            results["means"] = means(tasks, categories)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    for arm, mean in results["means"].items():
        low, high = mean["interval"]
        print(f"{arm:10} {mean['mean']:.3f} ({low:.3f} to {high:.3f}), {mean['tasks']} tasks")


def _scores(
    client: httpx.Client,
    task: dict[str, Any],
    metric: Metric,
    options: argparse.Namespace,
    kept: dict[str, float],
) -> dict[str, float]:
    """Return the score of each arm. ``kept``: scores of arms that are not asked again."""
    rng = random.Random(options.draw)
    train = list(map(tuple, task["train"]))
    if options.draw:
        rng.shuffle(train)
    rows: list[Pair] = list(map(tuple, task["test"]))[: options.rows]
    sentence = task["descriptions"][0]

    def mean(replies: Sequence[str], metric: Metric = metric) -> float:
        return mean_score(replies, rows, metric)

    def score(body: dict[str, Any], head: Sequence[dict[str, str]] = ()) -> float:
        return mean(replies(client, body, rows, head))

    scores = dict(kept)
    if not scores:
        ((commonest, _),) = Counter(answer for _, answer in train).most_common(1)
        of_sentence = replies(client, {"adapter": {"description": sentence}}, rows)
        scores = {
            "constant": mean([commonest] * len(rows)),
            "base": score({}),
            "prompt": score({}, [{"role": "system", "content": sentence}]),
            "sentence": mean(of_sentence),
        }
        if task["metric"] == "json_exact":
            scores["keys"] = mean(of_sentence, lambda reply, _: _has_named_keys(reply, sentence))
    for k in options.pairs:
        head = [message for pair in train[:k] for message in turn(*pair)]
        head[0]["content"] = f"{sentence}\n{head[0]['content']}"
        if k <= 16 and f"turns {k}" not in scores:
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
            scores[f"learnt {k}"] = scores[f"turns {min(k, 16)}"]  # which answer a chat
        if options.train:
            system = {"role": "system", "content": sentence}
            chats = [{"messages": [system, *turn(prompt, answer)]} for prompt, answer in train[:k]]
            _train(client, name, chats, budget_s)
            scores[f"train {k}"] = score({"adapter": name}, [system])
            client.delete(f"/v1/adapters/{name}")
    return scores


def _train(
    client: httpx.Client, name: str, chats: Sequence[dict[str, Any]], budget_s: float
) -> None:
    order = {"name": name, "examples": chats, "budget_s": budget_s}
    job = client.post("/v1/adapters/train", json=order).raise_for_status().json()
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
        for _ in events.iter_lines():  # until the job ends
            pass


def _has_named_keys(reply: str, sentence: str) -> float:
    """Return 1 if the reply is a JSON object, or a list of them, whose keys the sentence names."""
    try:
        value = json.loads(reply)
    except ValueError:
        return 0.0
    objects = value if isinstance(value, list) else [value]
    if not all(isinstance(each, dict) for each in objects):
        return 0.0
    return float(all(key in sentence for each in objects for key in each))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("research.natural", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Folder of the tasks.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="The server.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the scores.")
    parser.add_argument("--tasks", nargs="*", help="Names of tasks. Default: all.")
    parser.add_argument("--pairs", nargs="*", type=int, default=[16], help="Numbers of pairs.")
    parser.add_argument("--budget", type=float, default=30, help="Seconds for up to 16 pairs.")
    parser.add_argument("--rows", type=int, default=40, help="Rows of the test.")
    parser.add_argument(
        "--again", action="store_true", help="Only adapters from pairs; OUT keeps its other scores."
    )
    parser.add_argument("--train", action="store_true", help="Also /v1/adapters/train.")
    parser.add_argument("--draw", type=int, default=0, help="Seed of the pairs; 0: the first ones.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
