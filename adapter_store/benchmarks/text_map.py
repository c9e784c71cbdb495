"""What the text map makes of a sentence alone, by how the operation is read.

    python adapter_store/benchmarks/text_map.py --rows 16

On validation inputs of the wide zoo's validation tasks, by what is new about them, and of every
eleventh trained task; each with its first test wording, which was in no training step. Exact match
and NLL of one teacher-forced forward. Prints the table of
docs/generated-adapters-method.md. Some minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoTokenizer

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
    print("| | network | wordings | both | own |\n| --- | --- | --- | --- | --- |", flush=True)
    for name, tasks in sets.items():
        rows = data.eval_rows(tasks, n_rows, split="validation")
        cells = []
        for points in _readings(text_map, encoder, tasks):
            scores = score(rows, text_map.vector(points))
            exact = sum(one.exact for one in scores) / len(tasks)
            nll = sum(one.nll for one in scores) / len(tasks)
            cells.append(f"{exact:.0%} ({nll:.2f})")
        print(f"| {name} ({len(tasks)}) | {' | '.join(cells)} |", flush=True)


@torch.inference_mode()
def _readings(text_map: TextMap, encoder: SentenceEncoder, tasks: Sequence[Task]) -> list[Tensor]:
    """Points [n_tasks, n_rows]: by network, by wordings, by both; of the right content."""
    texts = [encoder.encode([task.test_descriptions()[0]]) for task in tasks]
    both = torch.stack([text_map.point(text) for text in texts])
    by_network, n = both.clone(), len(text_map.dressings.names)
    by_network[:, n:] = torch.cat([text_map.reader(text) for text in texts])
    found = [by_network, 2 * both - by_network, both]  # both: the mean of the two
    if all(task.content in text_map.contents for task in tasks):
        own = both.clone()
        own[:, n:] = text_map.codes[[text_map.contents.index(task.content) for task in tasks]]
        found.append(own)
    return found


if __name__ == "__main__":
    main()
