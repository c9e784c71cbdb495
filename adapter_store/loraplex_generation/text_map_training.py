"""Trains a TextMap through the frozen base, all tasks together; stopped and gone on with at will.

No text is read here. Every content, language and format has a place (a code) in the span of
directions that all share, and learns it together with them, each content in many formats: so that
what is learnt of an operation says nothing of the format. Afterwards readers learn from phrasings
to find content, language and format (`description_reader.py`). Rows of held-out tasks are in no
step, and words of held-out operations in no phrasing.

Training begins with the library's joint vectors, or beside a map: its rows then stay as they are,
and a few directions come to them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraplex_generation.zoo.cells import trainable
from loraplex_generation.zoo.split import ZooSplit
from loraplex_generation.zoo.tasks import Task

from .bundle import JOINT_FILE
from .description_reader import DescriptionReader, train_description_reader
from .dressings import Dressings, contents_of
from .errors import GeneratorMismatch, NotTrained
from .frozen_base import FrozenBase, LoraFA
from .label_reader import ReaderRecipe
from .layout import AdapterLayout
from .packing import ChatCodec, PromptTokenizer
from .row_adam import RowAdam
from .scoring import mean_nll_per_group
from .sentences import SentenceEncoder
from .task_training import RunningLosses, TaskTraining
from .taskdata import TaskData
from .tensor_file import read_tensor_file, write_tensor_file
from .text_map import TEXT_MAP_FILE, TextMap

__all__ = ["Start", "TextMapRecipe", "TextMapTraining", "refit_reader", "train_text_map"]

_NEW, _BESIDE = 96, 32  # directions, by default
_LEAST_SHARE = 1e-5  # of what the tasks' adapters are made of: directions below are left out
_LENGTH = 10.0  # of kept directions while codes are trained: the same step moves an adapter alike
_LEARNING_TO_READ = "learning to read descriptions: a quarter of an hour for hundreds of contents"
_SHORTEST = 1e-6  # a row that four bits have made zero


@dataclass(frozen=True, slots=True)
class TextMapRecipe:
    n_steps: int = 2200
    n_directions: int = 0  # that are trained; 0: 96, or 32 beside a map
    tasks_per_step: int = 8
    tokens_per_task: int = 80  # of rows, the shared head not counted
    lr_rows: float = 6e-4  # mean, languages, formats
    lr_directions: float = 4e-4
    lr_codes: float = 1e-2
    warmup: int = 40
    decay_from: float = 0.3  # fraction of the steps after which the rates fall along a cosine
    seed: int = 0

    def share(self, step: int) -> float:
        """Of the rates, at a step."""
        late = max(0.0, step / self.n_steps - self.decay_from) / (1 - self.decay_from)
        falling = 0.51 + 0.49 * math.cos(math.pi * min(1.0, late))
        return min(1.0, (step + 1) / self.warmup) * falling


@dataclass(frozen=True, slots=True)
class Start:
    """What a training begins with. Rows: those of the dressings, then directions."""

    dressings: Dressings
    contents: tuple[str, ...]
    rows: Tensor  # float32 [n_dressings + n_kept + n_directions, layout.size]
    codes: Tensor  # float32 [n_dressings + n_contents, n_kept + n_directions]
    n_kept: int  # directions that stay, and with them the dressings' rows; 0: all are trained

    @classmethod
    def beside(cls, text_map: TextMap, n_directions: int, *, seed: int = 0) -> Start:
        rows = torch.cat([text_map.rows.float(), torch.zeros(n_directions, text_map.layout.size)])
        kept = torch.cat([text_map.dressing_codes, text_map.codes])
        torch.manual_seed(seed)
        new = torch.randn(len(kept), n_directions)
        return cls(
            text_map.dressings,
            text_map.contents,
            rows,
            torch.cat([kept, new], 1),
            text_map.codes.shape[1],
        )

    @classmethod
    def of_rows(
        cls,
        tasks: Sequence[Task],
        size: int,
        n_directions: int,
        known: Mapping[str, Tensor] | None = None,
        *,
        seed: int = 0,
    ) -> Start:
        """`known`: rows [size] that were trained before, by name. The directions begin with what
        the others than dressings span; what none of them is made of starts with a random code.
        """
        dressings, contents = Dressings.of(tasks), contents_of(tasks)
        n = len(dressings.names)
        rows = torch.zeros(n + n_directions, size)
        torch.manual_seed(seed)
        codes = torch.randn(n + len(contents), n_directions)
        if known is not None:
            for i, name in enumerate(dressings.names):
                if name in known:
                    rows[i] = known[name]
            others = torch.stack([r for name, r in known.items() if name not in dressings.names])
            _, sizes, axes = torch.linalg.svd(others, full_matrices=False)
            spanned = min(len(sizes), n_directions)
            rows[n : n + spanned] = axes[:spanned] * (sizes[:spanned, None] / len(others) ** 0.5)
            codes[:, :spanned] = 0
        return cls(dressings, contents, rows, codes, 0)


class TextMapTraining(TaskTraining):
    """Owner of rows and codes while they are trained. Not thread-safe."""

    name, report_every = "text map", 20

    def __init__(
        self,
        base: FrozenBase,
        layout: AdapterLayout,
        data: TaskData,
        tasks: Sequence[Task],
        recipe: TextMapRecipe,
        start: Start,
    ) -> None:
        """`tasks`: of contents, languages and formats that `start` has."""
        losses = RunningLosses(tasks, start=1.0, base_weight=0.2, max_loss=1.0)
        super().__init__(recipe.n_steps, losses)
        self._base, self._layout, self._data = base, layout, data
        self.recipe, self._dressings, self._contents = recipe, start.dressings, start.contents
        self._at = {content: i for i, content in enumerate(start.contents)}
        self._n_dressings, self._n_kept = len(start.dressings.names), start.n_kept
        first = self._n_dressings + start.n_kept
        self._dressing_rows = start.rows[: self._n_dressings].clone()
        self._kept = start.rows[self._n_dressings : first]
        self._lengths = (self._kept.norm(dim=1) / _LENGTH).clamp_min(_SHORTEST)
        self._directions = start.rows[first:].clone().requires_grad_()
        self._codes = start.codes.clone()
        self._codes[:, : start.n_kept] *= self._lengths
        self._code_adam = RowAdam(self._codes)
        self._dressing_adam = RowAdam(self._dressing_rows) if start.n_kept == 0 else None
        self._adam = torch.optim.Adam(
            [self._directions], lr=recipe.lr_directions, betas=(0.9, 0.99), fused=True
        )

    def vectors(self, tasks: Sequence[Task]) -> Tensor:
        """[n_tasks, layout.size], as they are now."""
        with torch.no_grad():
            parts = self._parts(tasks)
            return self._made(parts, parts @ self._codes)

    def finished(self, reader: DescriptionReader, tasks: Sequence[Task]) -> TextMap:
        """The map as it is now. `tasks`: the training set, which decides what directions are for.

        The trained directions are made orthogonal to those that stayed, and to each other.
        """
        n, kept = self._n_dressings, self._n_kept
        with torch.no_grad():
            new, places = self._directions.detach().clone(), self._codes[:, kept:]
            old = self._codes[:, :kept] / self._lengths
            rows = self._kept
            if kept:
                inside = torch.linalg.lstsq(rows.T, new.T).solution.T  # [n_new, n_kept]
                new -= inside @ rows
                old = old + places @ inside
            turn, directions = _orthogonal(self._parts(tasks) @ places, new)
            codes = torch.cat([old, places @ turn], 1)
        return TextMap(
            layout=self._layout,
            base_fingerprint=self._base.fingerprint,
            reader=reader,
            rows=torch.cat([self._dressing_rows, rows, directions]).bfloat16(),
            codes=codes[n:],
            dressing_codes=codes[:n],
            tasks=tuple(task.name for task in tasks),
            step=self.step,
        )

    def _parts(self, tasks: Sequence[Task]) -> Tensor:
        """[n_tasks, n_dressings + n_contents], ones where a task has the part."""
        content = F.one_hot(torch.tensor([self._at[t.content] for t in tasks]), len(self._at))
        return torch.cat([self._dressings.exact_points(tasks), content.float()], 1)

    def _made(self, parts: Tensor, codes: Tensor) -> Tensor:
        """[n_tasks, layout.size] of parts and what they have in the span of the directions."""
        kept = self._kept / self._lengths[:, None]
        rows = torch.cat([self._dressing_rows, kept, self._directions])
        made: Tensor = torch.cat([parts[:, : self._n_dressings], codes], 1) @ rows
        return made

    def _one_step(self) -> float:
        recipe = self.recipe
        rng = random.Random(f"{recipe.seed}:{self.step}")
        tasks = self._losses.draw(recipe.tasks_per_step, rng)
        parts = self._parts(tasks)
        codes = (parts @ self._codes).requires_grad_()
        vectors = self._made(parts, codes)
        vectors.retain_grad()
        batch = self._data.train_batch(tasks, recipe.tokens_per_task, rng)
        adapters = LoraFA(self._layout, vectors, self._base.dtype)
        losses = mean_nll_per_group(self._base.score(batch, adapters).nll, batch)
        self._adam.zero_grad()
        torch.autograd.backward(losses.mean())
        share = recipe.share(self.step)
        self._adam.param_groups[0]["lr"] = recipe.lr_directions * share
        self._adam.step()
        assert codes.grad is not None
        assert vectors.grad is not None
        touched = parts.any(0).nonzero()[:, 0]
        self._code_adam.step(parts.T @ codes.grad, touched, lr=recipe.lr_codes * share)
        if self._dressing_adam is not None:
            dressing = parts[:, : self._n_dressings]
            rows = dressing.any(0).nonzero()[:, 0]
            self._dressing_adam.step(dressing.T @ vectors.grad, rows, lr=recipe.lr_rows * share)
        self._losses.note(tasks, losses)
        return float(losses.detach().mean())

    def save(self, path: Path) -> None:
        tensors = {"codes": self._codes, "directions": self._directions.detach()}
        tensors |= {f"code_adam.{name}": value for name, value in self._code_adam.state().items()}
        if self._dressing_adam is not None:
            tensors["rows"] = self._dressing_rows
            state = self._dressing_adam.state()
            tensors |= {f"row_adam.{name}": value for name, value in state.items()}
        tensors |= {
            f"adam.{name}": value
            for name, value in self._adam.state_dict()["state"].get(0, {}).items()
        }
        header = {"step": self.step, "loss": self._losses.by_task, "recipe": asdict(self.recipe)}
        write_tensor_file(path, tensors, header)

    def _restore(self, path: Path) -> None:
        file = read_tensor_file(path)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in file.tensors.items():
            owner, _, rest = name.partition(".")
            parts.setdefault(owner, {})[rest] = tensor
        self._codes.copy_(parts["codes"][""])
        with torch.no_grad():
            self._directions.copy_(parts["directions"][""])
        self._code_adam.restore(parts["code_adam"])
        if self._dressing_adam is not None:
            self._dressing_rows.copy_(parts["rows"][""])
            self._dressing_adam.restore(parts["row_adam"])
        kept = self._adam.state_dict()
        kept["state"] = {0: parts["adam"]} if "adam" in parts else {}
        self._adam.load_state_dict(kept)
        self._losses.restore(file.header["loss"])
        self.step = int(file.header["step"])


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
    reading: ReaderRecipe = ReaderRecipe(),  # noqa: B008  frozen value
) -> Path:
    """To a text map in `shipped`, beside the one that is there, or from the joint vectors there
    where that is of another format, base or training set.

    Of the training tasks' contents every format is trained that no held-out task has. The run's
    state is in `folder`.
    """
    base = FrozenBase(base_directory)
    joint = read_tensor_file(shipped / JOINT_FILE)
    layout = AdapterLayout.from_dict(joint.header["layout"])
    tasks = [Task.parse(name) for name in split.sets["train"]]
    known_map = _to_go_on_with(shipped / TEXT_MAP_FILE, base, layout, tasks)
    if known_map is not None:
        report("training beside the map that is there")
        start = Start.beside(known_map, recipe.n_directions or _BESIDE)
    else:
        report("no map of these tasks for this base: training begins with the joint vectors")
        names = joint.header["factors"]
        known = dict(zip(names, joint.tensors["vectors"].float(), strict=True))
        start = Start.of_rows(tasks, layout.size, recipe.n_directions or _NEW, known)
    data = TaskData(ChatCodec(tokenizer))
    training = TextMapTraining(base, layout, data, trainable(split), recipe, start)
    state = folder / "training.safetensors"
    training.run(state, report=report, every_s=300)
    report(_LEARNING_TO_READ)
    reader = train_description_reader(encoder, start.dressings, start.contents, reading)
    path = training.finished(reader, tasks).save(shipped)
    state.unlink()  # the next run begins beside the new map
    return path


def refit_reader(
    folder: Path,
    encoder: SentenceEncoder,
    reading: ReaderRecipe = ReaderRecipe(),  # noqa: B008  frozen value
    *,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Learns anew to read and refuse descriptions for the map in `folder`, whose rows and codes
    keep their bits.

    Raises NotTrained where there is no map, GeneratorMismatch for a file of another format.
    """
    path = folder / TEXT_MAP_FILE
    if not path.is_file():
        raise NotTrained(f"no {path.name}; run `loraplex generator text-map`")
    known = TextMap.load(path)
    report(_LEARNING_TO_READ)
    reader = train_description_reader(encoder, known.dressings, known.contents, reading)
    return replace(known, reader=reader).save(folder)


def _to_go_on_with(
    path: Path, base: FrozenBase, layout: AdapterLayout, tasks: Sequence[Task]
) -> TextMap | None:
    if not path.is_file():
        return None
    try:
        found = TextMap.load(path)
    except GeneratorMismatch:
        return None
    asked = (base.fingerprint, layout, tuple(task.name for task in tasks))
    return found if (found.base_fingerprint, found.layout, found.tasks) == asked else None


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
