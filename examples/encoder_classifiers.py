"""Several classifiers on one text encoder: trained with PEFT, uploaded, and asked together.

loraplex serve --model all-minilm-l6-v2 &
python examples/encoder_classifiers.py ~/.cache/loraplex/models/all-minilm-l6-v2 [TASKS]

TASKS is a folder of files {"name", "train": [[text, label], …], "test": [[text, label], …]};
without it, two small tasks of this script are learnt. Prints the share of right answers.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

URL = os.environ.get("LORAPLEX_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("LORAPLEX_API_KEY", "none")
Pairs = list[tuple[str, str]]  # text, label
N_EPOCHS = 25
SMALL = {
    "topic": (
        "sport: The striker scored twice in the final | sport: She won the marathon in the rain | "
        "sport: The coach rested his goalkeeper | sport: A late penalty decided the match | "
        "sport: The cyclist broke the hour record | sport: Our team lost the cup again | "
        "food: Simmer the soup for an hour | food: The bakery sells warm rye bread | "
        "food: Add garlic and a little salt | food: We ate noodles by the harbour | "
        "food: The cheese is aged for two years | food: Fry the onions until golden",
        "sport: The referee sent off a defender | sport: He swam the relay in record time | "
        "food: Bake the cake until it is brown | food: This sauce needs more pepper",
    ),
    "request": (
        "refund: I want my money back | refund: Please return the payment for my order | "
        "refund: You charged me twice, pay it back | refund: Cancel it and refund my card | "
        "refund: When will I get my money | refund: The item broke, I want a refund | "
        "delivery: Where is my parcel | delivery: The package has not arrived | "
        "delivery: Can you ship it to another address | delivery: The courier never came | "
        "delivery: Track my shipment, please | delivery: My order is late",
        "refund: Send back what I paid | refund: I ask for a refund of this order | "
        "delivery: Has my package been shipped | delivery: The parcel is still not here",
    ),
}


def tasks_of(folder: Path | None) -> dict[str, tuple[Pairs, Pairs]]:
    """Return name → pairs to learn from, and pairs that are held out."""
    if folder is None:
        return {name: (_pairs(train), _pairs(test)) for name, (train, test) in SMALL.items()}
    files = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    return {
        task["name"].replace("_", "-"): (
            [(text, label) for text, label in task["train"]],
            [(text, label) for text, label in task["test"]],
        )
        for task in files
        if len({label for _, label in task["train"]}) <= 20  # a task of labels
    }


def _pairs(text: str) -> Pairs:
    split = (line.partition(": ") for line in text.split(" | "))
    return [(text, label) for label, _, text in split]


def train(base: str, pairs: Pairs, folder: Path) -> None:
    """Train a LoRA and a head on ``pairs``, and save them with the names of the labels."""
    torch.manual_seed(0)
    labels = sorted({label for _, label in pairs})
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(labels), id2label=dict(enumerate(labels))
    )
    targets = ["query", "value", "dense"]
    tuned = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=targets))
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [text for text, _ in pairs]
    truth = torch.tensor([labels.index(label) for _, label in pairs])
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=2e-3)
    tuned.train()
    for _ in range(N_EPOCHS):
        for rows in torch.randperm(len(pairs)).split(16):
            batch = [texts[row] for row in rows]
            inputs = tokenizer(batch, return_tensors="pt", padding=True, truncation=True)
            tuned(**inputs, labels=truth[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    tuned.save_pretrained(folder)
    model.config.save_pretrained(folder)  # the names of the labels


def main() -> None:
    base, *rest = sys.argv[1:]
    tasks = tasks_of(Path(rest[0]) if rest else None)
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        tempfile.TemporaryDirectory() as folder,
        httpx.Client(base_url=URL, headers=headers, timeout=120) as client,
    ):
        for name, (pairs, _) in tasks.items():
            path = Path(folder) / name
            train(base, pairs, path)
            parts = ("adapter_config.json", "adapter_model.safetensors", "config.json")
            files = {part: (path / part).read_bytes() for part in parts}
            client.put(f"/v1/adapters/{name}", files=files).raise_for_status()

        def ask(question: tuple[str, str, str]) -> tuple[str, bool]:
            name, text, label = question
            answer = client.post("/classify", json={"adapter": name, "input": text})
            return name, answer.raise_for_status().json()["data"][0]["label"] == label

        asked = [(name, *pair) for name, (_, test) in tasks.items() for pair in test]
        with ThreadPoolExecutor(16) as pool:  # texts of all classifiers share steps
            right = list(pool.map(ask, asked))
    for name, (pairs, test) in tasks.items():
        share = sum(is_right for own, is_right in right if own == name) / len(test)
        n_labels = len({label for _, label in pairs})
        print(f"{name}: {share:.0%} of {len(test)} texts right, {n_labels} labels")
    print(f"all {len(tasks)}: {sum(is_right for _, is_right in right) / len(right):.1%}")


if __name__ == "__main__":
    main()
