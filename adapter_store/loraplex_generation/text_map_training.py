"""Trains a TextMap through the frozen base, all tasks together; stopped and gone on with at will.

A step takes a few tasks, and for each a wording of its operation *in any format*: what is read of
the operation then says nothing of the format, which has a row of its own. Rows of held-out tasks
and words of held-out operations are in no step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraplex_generation.zoo.split import ZooSplit
from loraplex_generation.zoo.tasks import Task

from .bundle import JOINT_FILE
from .factors import FactorHead, train_factor_head
from .frozen_base import FrozenBase, LoraFA
from .layout import AdapterLayout
from .packing import ChatCodec, PromptTokenizer
from .row_adam import RowAdam
from .scoring import mean_nll_per_group
from .sentences import Encoded, SentenceEncoder
from .task_training import RunningLosses, TaskTraining
from .taskdata import TaskData
from .tensor_file import read_tensor_file, write_tensor_file
from .text_map import Dressings, OperationReader, ReaderShape, TextMap, contents_of
from .training import Wordings, fit_guard

__all__ = ["ContentWordings", "TextMapRecipe", "TextMapTraining", "train_text_map"]

_LEAST_SHARE = 1e-5  # of what the tasks' adapters are made of: directions below are left out


@dataclass(frozen=True, slots=True)
class TextMapRecipe:
    n_steps: int = 2400
    n_directions: int = 96
    tasks_per_step: int = 8
    tokens_per_task: int = 80  # of rows, the shared head not counted
    lr_rows: float = 6e-4  # mean, languages, formats
    lr_directions: float = 3e-4
    lr_reader: float = 1e-3
    warmup: int = 40
    decay_from: float = 0.4  # fraction of the steps after which the rates fall along a cosine
    noise: float = 0.1  # added to token states
    n_wordings: int = 6  # of a content in each format and style
    seed: int = 0

    def share(self, step: int) -> float:
        """Of the rates, at a step."""
        late = max(0.0, step / self.n_steps - self.decay_from) / (1 - self.decay_from)
        falling = 0.51 + 0.49 * math.cos(math.pi * min(1.0, late))
        return min(1.0, (step + 1) / self.warmup) * falling


class ContentWordings:
    """Training wordings of contents (operation and language), each in every format, encoded."""

    def __init__(
        self, encoder: SentenceEncoder, tasks: Sequence[Task], formats: Sequence[str], n: int
    ) -> None:
        contents = list(dict.fromkeys((task.operation, task.language) for task in tasks))
        self._at: dict[tuple[str, str], range] = {}
        self.tasks: list[Task] = []  # that each text describes
        texts: list[str] = []
        for content in contents:
            first = len(texts)
            for dressing in formats:
                task = Task(*content, dressing)
                found = [*task.descriptions()[:n], *task.casual_descriptions()[-n:]]
                texts += found
                self.tasks += [task] * len(found)
            self._at[content] = range(first, len(texts))
        encoded = encoder.encode(texts)
        self._encoded = encoded._replace(tokens=encoded.tokens.half())

    @property
    def encoded(self) -> Encoded:
        """All of them, the token states in float16."""
        return self._encoded

    def of(self, task: Task) -> Encoded:
        """All wordings of its content."""
        at = self._at[task.operation, task.language]
        part = self._encoded.rows(torch.arange(at.start, at.stop))
        return part._replace(tokens=part.tokens.float())

    def draw(self, tasks: Sequence[Task], rng: random.Random) -> Encoded:
        """One wording of each task's content."""
        chosen = [rng.choice(self._at[task.operation, task.language]) for task in tasks]
        part = self._encoded.rows(torch.tensor(chosen))
        longest = int(part.mask.sum(1).max())
        return Encoded(part.tokens[:, :longest].float(), part.mask[:, :longest], part.sentence)


class TextMapTraining(TaskTraining):
    """Owner of the map while it is trained. Not thread-safe."""

    name, report_every = "text map", 20

    def __init__(
        self,
        base: FrozenBase,
        layout: AdapterLayout,
        data: TaskData,
        tasks: Sequence[Task],
        words: ContentWordings,
        recipe: TextMapRecipe,
        *,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`start`: rows that were trained before, by name; D begins with what the others than
        dressings span.
        """
        losses = RunningLosses(tasks, start=2.0, base_weight=0.2, max_loss=1.0)
        super().__init__(recipe.n_steps, losses)
        self._base, self._layout, self._data = base, layout, data
        self._tasks, self._words, self.recipe = list(tasks), words, recipe
        torch.manual_seed(recipe.seed)
        dressings = Dressings.of(tasks)
        width = words.encoded.tokens.shape[-1]
        reader = OperationReader(ReaderShape(width, recipe.n_directions))
        rows = torch.zeros(len(dressings.names), layout.size)
        directions = torch.zeros(recipe.n_directions, layout.size)
        self._dressings, self._reader, self._rows = dressings, reader, rows
        with torch.no_grad():
            reader.outer.weight.normal_(std=0.3 / reader.shape.hidden**0.5)
            reader.outer.bias.zero_()
            if start is not None:
                self._start_from(start, directions)
        self._directions = directions.requires_grad_()
        self._dressing_adam = RowAdam(rows)
        self._adam = torch.optim.Adam(
            [
                {"params": [self._directions], "lr": recipe.lr_directions},
                {"params": list(reader.parameters()), "lr": recipe.lr_reader},
            ],
            betas=(0.9, 0.99),
            fused=True,
        )
        self._rates = [recipe.lr_directions, recipe.lr_reader]

    def vector_of(self, task: Task, encoded: Encoded) -> Tensor:
        """[n_texts, layout.size]: what texts become now, in the format and language of `task`."""
        dressing = self._dressings.exact_points([task])
        with torch.no_grad():
            read: Tensor = self._reader.eval()(encoded)
            return dressing @ self._rows + read @ self._directions

    def finished(self, encoder: SentenceEncoder) -> TextMap:
        """The map as it is now, its directions orthogonal; a minute for hundreds of tasks."""
        reader = self._reader.eval()
        with torch.no_grad():
            contents = {task.content: task for task in self._tasks}.values()
            read = torch.stack([reader(self._words.of(task)).mean(0) for task in contents])
            turn, directions = _orthogonal(read, self._directions.detach())
        words = Wordings(encoder, self._tasks, casual=True)
        return TextMap(
            layout=self._layout,
            base_fingerprint=self._base.fingerprint,
            dressings=self._dressings,
            head=self._dressing_head(),
            reader=reader.turned(turn),
            rows=torch.cat([self._rows, directions]).bfloat16(),
            tasks=tuple(task.name for task in self._tasks),
            contents=contents_of(self._tasks),
            codes=read @ turn,
            wordings=words.centroids,
            guard=fit_guard(encoder, words, lambda task: task.content),
            step=self.step,
        )

    def _dressing_head(self) -> FactorHead:
        labels = torch.tensor([self._dressings.labels(task) for task in self._words.tasks])
        groups = self._dressings.groups
        return train_factor_head(self._words.encoded, labels, groups, seed=self.recipe.seed)

    def _one_step(self) -> float:
        recipe = self.recipe
        rng = random.Random(f"{recipe.seed}:{self.step}")
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * recipe.share(self.step)
        tasks = self._losses.draw(recipe.tasks_per_step, rng)
        dressing = self._dressings.exact_points(tasks)
        words = self._words.draw(tasks, rng)
        noisy = words._replace(tokens=words.tokens + recipe.noise * torch.randn_like(words.tokens))
        vectors = dressing @ self._rows + self._reader.train()(noisy) @ self._directions
        vectors.retain_grad()
        batch = self._data.train_batch(tasks, recipe.tokens_per_task, rng)
        adapters = LoraFA(self._layout, vectors, self._base.dtype)
        losses = mean_nll_per_group(self._base.score(batch, adapters).nll, batch)
        self._adam.zero_grad()
        torch.autograd.backward(losses.mean())
        self._adam.step()
        assert vectors.grad is not None
        touched = dressing.any(0).nonzero()[:, 0]
        rate = recipe.lr_rows * recipe.share(self.step)
        self._dressing_adam.step(dressing.T @ vectors.grad, touched, lr=rate)
        self._losses.note(tasks, losses)
        return float(losses.detach().mean())

    def save(self, path: Path) -> None:
        tensors = {"rows": self._rows, "directions": self._directions.detach()}
        tensors |= {f"reader.{name}": value for name, value in self._reader.state_dict().items()}
        tensors |= {
            f"row_adam.{name}": value for name, value in self._dressing_adam.state().items()
        }
        for i, state in self._adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
        header = {"step": self.step, "loss": self._losses.by_task, "recipe": asdict(self.recipe)}
        write_tensor_file(path, tensors, header)

    def _restore(self, path: Path) -> None:
        file = read_tensor_file(path)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in file.tensors.items():
            owner, _, rest = name.partition(".")
            parts.setdefault(owner, {})[rest] = tensor
        self._rows.copy_(parts["rows"][""])
        with torch.no_grad():
            self._directions.copy_(parts["directions"][""])
        self._reader.load_state_dict(parts["reader"])
        self._dressing_adam.restore(parts["row_adam"])
        kept = self._adam.state_dict()
        kept["state"] = {}
        for name, tensor in parts["adam"].items():
            i, _, rest = name.partition(".")
            kept["state"].setdefault(int(i), {})[rest] = tensor
        self._adam.load_state_dict(kept)
        self._losses.restore(file.header["loss"])
        self.step = int(file.header["step"])

    def _start_from(self, start: Mapping[str, Tensor], directions: Tensor) -> None:
        """A direction that means something already is not read of any text yet."""
        names = self._dressings.names
        for i, name in enumerate(names):
            if name in start:
                self._rows[i] = start[name]
        others = torch.stack([row for name, row in start.items() if name not in names])
        _, sizes, axes = torch.linalg.svd(others, full_matrices=False)
        n = min(len(sizes), len(directions))
        directions[:n] = axes[:n] * (sizes[:n, None] / len(others) ** 0.5)
        self._reader.outer.weight[:n] = 0


def train_text_map(
    base_directory: Path,
    encoder: SentenceEncoder,
    tokenizer: PromptTokenizer,
    split: ZooSplit,
    *,
    folder: Path,
    shipped: Path,
    recipe: TextMapRecipe,
    report: Callable[[str], None],
) -> Path:
    """From the joint vectors in `shipped` to a text map there; the run's state is in `folder`."""
    base = FrozenBase(base_directory)
    joint = read_tensor_file(shipped / JOINT_FILE)
    start = dict(zip(joint.header["factors"], joint.tensors["vectors"].float(), strict=True))
    layout = AdapterLayout.from_dict(joint.header["layout"])
    tasks = [Task.parse(name) for name in split.sets["train"]]
    report(f"encoding the wordings of {len(tasks)} tasks")
    words = ContentWordings(encoder, tasks, Dressings.of(tasks).formats, recipe.n_wordings)
    data = TaskData(ChatCodec(tokenizer))
    training = TextMapTraining(base, layout, data, tasks, words, recipe, start=start)
    training.run(folder / "training.safetensors", report=report, every_s=300)
    report("fitting the guard")
    return training.finished(encoder).save(shipped)


def _orthogonal(points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """(turn [n, k], directions [k, size]) with points · turn · directions as points [m, n] · D are.

    The new directions are orthogonal, the longest first, and the points' coordinates of spread one.
    """
    gram = directions @ directions.T
    values, vectors = torch.linalg.eigh((points @ gram @ points.T).double())
    kept = values > _LEAST_SHARE * values.sum()
    lengths = values[kept].flip(0).sqrt().float()
    axes = vectors[:, kept].flip(1).float()  # [m, k]
    mix = (axes / lengths).T @ points  # [k, n]: directions of length one
    spread = lengths / len(points) ** 0.5
    return gram @ mix.T / spread, spread[:, None] * (mix @ directions)
