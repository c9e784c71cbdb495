"""The mixed data of the shipped MixLoRA adapter: eight small text chores of six task families.

Each request says what to do and gives the input, so one adapter can serve all of them:
``python -m research.zoo.chores FOLDER`` writes train.jsonl and validation.jsonl.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from .tasks import Task

CHORES = (
    "date.de/sentence",
    "last-first/plain",
    "initials/tag",
    "list-reverse/quotes",
    "list-count/plain",
    "record-weekday/caps",
    "plural/tag",
    "minutes/plain",
)
N_TRAIN, N_VALIDATION = 320, 24  # examples of each chore

Chat = dict[str, list[dict[str, str]]]


def chats(names: Sequence[str], split: str, n: int, *, seed: int = 0) -> list[Chat]:
    """``n`` chats of each task in a shuffled order that depends on the arguments alone.

    Wordings come from the split: test wordings occur in no training chat.
    """
    rng = random.Random(f"chores:{split}:{seed}")
    found: list[Chat] = []
    for name in names:
        task = Task.parse(name)
        wordings = task.descriptions() if split == "train" else task.test_descriptions()
        for example in task.examples(split, n, seed=seed):
            request = f"{rng.choice(wordings)}:\n{example.prompt}"
            found.append(
                {
                    "messages": [
                        {"role": "user", "content": request},
                        {"role": "assistant", "content": example.answer},
                    ]
                }
            )
    rng.shuffle(found)
    return found


def write(folder: Path, names: Sequence[str] = CHORES) -> tuple[Path, Path]:
    """Writes both files and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, n in (("train", N_TRAIN), ("validation", N_VALIDATION)):
        path = folder / f"{split}.jsonl"
        lines = [json.dumps(chat, ensure_ascii=False) for chat in chats(names, split, n)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]


if __name__ == "__main__":
    for written in write(Path(sys.argv[1])):
        print(written)
