"""What the text map makes of a sentence alone.

    python adapter_store/benchmarks/text_map.py --rows 16

On validation inputs of the wide zoo's validation tasks, by what is new about them, and of every
eleventh trained task; each with its first test wording, which no training has seen. *read*: as the
server reads it; *own*: with the right content. Exact match and NLL of one teacher-forced forward.
Then how often content and format are read right, and what the check refuses, over all test
wordings of trained contents that no test task has, and of validation tasks. Prints the tables of
docs/generated-adapters-method.md. Some minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoTokenizer

from loraplex_generation.description_reader import DescriptionReader
from loraplex_generation.frozen_base import FrozenBase
from loraplex_generation.packing import ChatCodec
from loraplex_generation.scoring import TeacherForced
from loraplex_generation.sentences import SentenceEncoder
from loraplex_generation.shipped import shipped_folder
from loraplex_generation.taskdata import TaskData
from loraplex_generation.text_map import TEXT_MAP_FILE, TextMap
from loraplex_generation.zoo.novelty import novelty
from loraplex_generation.zoo.split import load_split
from loraplex_generation.zoo.tasks import Task
from loraplex_server.model.pull import resolve_encoder, resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="inputs of a task")
    n_rows = parser.parse_args().rows
    torch.set_num_threads(1)
    directory = resolve_model(None)
    text_map = TextMap.load(shipped_folder() / TEXT_MAP_FILE)
    data = TaskData(ChatCodec(AutoTokenizer.from_pretrained(directory)))
    score = TeacherForced(FrozenBase(directory), data.head, text_map.layout)
    encoder = SentenceEncoder(resolve_encoder())
    trained = [Task.parse(name) for name in text_map.tasks]
    sets = {f"of the {len(trained)} trained tasks": trained[5::11]}
    for name in load_split("wide").sets["validation"]:
        task = Task.parse(name)
        sets.setdefault(novelty(task, trained), []).append(task)
    print("| | read | own |\n| --- | --- | --- |", flush=True)
    for name, tasks in sets.items():
        rows = data.eval_rows(tasks, n_rows, split="validation")
        cells = []
        for points in _points(text_map, encoder, tasks):
            scores = score(rows, text_map.vector(points))
            exact = sum(one.exact for one in scores) / len(tasks)
            nll = sum(one.nll for one in scores) / len(tasks)
            cells.append(f"{exact:.0%} ({nll:.2f})")
        print(f"| {name} ({len(tasks)}) | {' | '.join(cells)} |", flush=True)
    print(
        "\n| wordings | right content | among three | right format | refused |\n"
        "| --- | --- | --- | --- | --- |"
    )
    tested = {Task.parse(name).content for name in load_split("wide").sets["test"]}
    sets[f"of the {len(trained)} trained tasks"] = [t for t in trained if t.content not in tested]
    for name, tasks in sets.items():
        print(f"| {name} | {' | '.join(_reading(text_map.reader, encoder, tasks))} |", flush=True)


@torch.inference_mode()
def _points(text_map: TextMap, encoder: SentenceEncoder, tasks: Sequence[Task]) -> list[Tensor]:
    """[n_tasks, n_rows], as read from the first test wording of each, and of the right content."""
    texts = [encoder.encode([task.test_descriptions()[0]]) for task in tasks]
    found = [torch.stack([text_map.point(text_map.read(text)) for text in texts])]
    if all(task.content in text_map.contents for task in tasks):
        found.append(text_map.points_of(tasks))
    return found


def _reading(
    reader: DescriptionReader, encoder: SentenceEncoder, tasks: Sequence[Task]
) -> list[str]:
    """Shares of the test wordings."""
    texts = [(task, text) for task in tasks for text in task.test_descriptions()]
    encoded = encoder.encode([text for _, text in texts])
    refused = (reader.scores(encoded) > reader.limit).float().mean()
    known = [reader.contents.index(t.content) for t, _ in texts if t.content in reader.contents]
    of_format = torch.tensor([reader.dressings.formats.index(task.format) for task, _ in texts])
    right = (reader.format(encoded).argmax(1) == of_format).float().mean()
    found = ["", "", f"{right:.0%}", f"{refused:.0%} of {len(texts)}"]
    if len(known) == len(texts):
        best = reader.content.shares(encoded).topk(3).indices == torch.tensor(known)[:, None]
        found[:2] = [f"{best[:, 0].float().mean():.0%}", f"{best.any(1).float().mean():.0%}"]
    return found


if __name__ == "__main__":
    main()
