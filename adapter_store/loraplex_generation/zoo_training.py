"""`loraplex zoo train`: the two stages of the library and the oracles, resumable at any moment.

<folder>/run.json            the base that all of it is for, and whether the run began anew
<folder>/joint.safetensors   stage one: factor vectors, optimiser state, step
<folder>/experts/NAME.safetensors  stage two: one file per finished task
<folder>/oracles/NAME.safetensors  adapters trained on held-out tasks, from the mean of the training
                                   tasks: no description had a say
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex_generation.zoo.split import ZooSplit, load_split
from loraplex_generation.zoo.tasks import Task

from .bundle import JOINT_FILE
from .errors import GeneratorMismatch, NotTrained
from .experts import Expert, ExpertCard, ExpertRecipe, train_experts
from .factors import FactorHead, Factors, train_factor_head
from .frozen_base import FrozenBase
from .joint import JointRecipe, JointTraining
from .layout import AdapterLayout
from .library import LIBRARY_FILE, Library, export_library
from .multi_task import train_multi_task
from .packing import ChatCodec, PromptTokenizer
from .sentences import SentenceEncoder
from .taskdata import TaskData
from .tensor_file import read_tensor_file, write_tensor_file

__all__ = ["STAGES", "ZooStatus", "ZooTraining"]

STAGES = ("joint", "oracles", "multi-task", "experts")  # in this order


_FIRST_LAYER, _RANK, _SCALE, _SEED = (
    8,
    5,
    2.0,
    20,
)  # chosen by a pilot: docs/generated-adapters-method.md
_GROUP = 4  # tasks per forward in stage two
_MULTI_TASK_FILE = "multi_task.safetensors"
_RUN_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class ZooStatus:
    joint_step: int
    joint_steps: int
    n_experts: int
    n_train: int
    n_oracles: int
    n_held_out: int

    @property
    def complete(self) -> bool:
        return (
            self.joint_step >= self.joint_steps
            and self.n_experts == self.n_train
            and self.n_oracles == self.n_held_out
        )


class ZooTraining:
    """One training run, owner of `folder`. `shipped` holds what was exported last; a run for the
    same base goes on from it.
    """

    def __init__(
        self,
        folder: Path,
        shipped: Path,
        *,
        joint: JointRecipe = JointRecipe(),  # noqa: B008  frozen value
        expert: ExpertRecipe = ExpertRecipe(),  # noqa: B008
        oracle: ExpertRecipe | None = None,
        multi_task_steps: int = 240,  # as many as the joint stage
        split: ZooSplit | None = None,
    ) -> None:
        self.folder, self._shipped = folder, shipped
        self._base: str | None = None  # its fingerprint, once a run or an export has begun
        self._joint, self._expert = joint, expert
        self._oracle = oracle or replace(expert, max_steps=96, lr=3e-3)
        self._multi_task_steps = multi_task_steps
        self.split = split or load_split()
        self.tasks = [Task.parse(name) for name in self.split.sets["train"]]
        self.held_out = [
            Task.parse(name) for name in (*self.split.test, *self.split.sets["validation"])
        ]

    @staticmethod
    def layout_for(base: FrozenBase) -> AdapterLayout:
        first = min(_FIRST_LAYER, base.shape.n_layers // 2)
        return AdapterLayout(base.shape, first, _RANK, _SCALE * _RANK, _SEED)

    def status(self) -> ZooStatus:
        """What is on disk. Starts nothing."""
        known = {t.name for t in self.tasks}
        done = {e.stem for e in (self.folder / "experts").glob("*.safetensors")}
        done |= {_file_name(n) for n in self._shipped_tasks()}
        return ZooStatus(
            joint_step=self._joint_step(),
            joint_steps=self._joint.n_steps,
            n_experts=len(done & {_file_name(n) for n in known}),
            n_train=len(self.tasks),
            n_oracles=len(list((self.folder / "oracles").glob("*.safetensors"))),
            n_held_out=len(self.held_out),
        )

    def run(
        self,
        base_directory: Path,
        encoder: SentenceEncoder,
        tokenizer: PromptTokenizer,
        *,
        report: Callable[[str], None],
        stages: Sequence[str] = STAGES,
        checkpoint_every_s: float = 90.0,
        restart: bool = False,
    ) -> None:
        """Goes on from whatever is there, to the end. Minutes are lost when it is killed.

        `restart` deletes the folder, and nothing that was shipped is gone on from. Raises
        GeneratorMismatch if the folder is of another base. Stages other than "joint" start from
        the joint vectors that are there. Two processes may share a folder as long as they run
        different stages.
        """
        base = FrozenBase(base_directory)
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._open(base.fingerprint)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._begun() is None:
            begun = json.dumps({"base": base.fingerprint, "restarted": restart})
            (self.folder / _RUN_FILE).write_text(begun)
        layout = self.layout_for(base)
        data = TaskData(ChatCodec(tokenizer))
        if "joint" in stages:
            factors, head = Factors.of(self.tasks), self.factor_head(encoder)
            points = {t.name: self._points(encoder, factors, head, t) for t in self.tasks}
            self._run_joint(base, layout, data, points, report, checkpoint_every_s)
        if "oracles" in stages:
            trained = self._starts(encoder, self.joint_vectors()[0], self.tasks)
            mean = torch.stack(list(trained.values())).mean(0)
            starts = dict.fromkeys((t.name for t in self.held_out), mean)
            self._run_group(
                "oracles", base, layout, data, self.held_out, starts, self._oracle, report
            )
        if "multi-task" in stages:
            self._run_multi_task(base, layout, data, report)
        if "experts" in stages:
            starts = self._starts(encoder, self.joint_vectors()[0], self.tasks)
            self._run_group("experts", base, layout, data, self.tasks, starts, self._expert, report)

    def factor_head(self, encoder: SentenceEncoder, *, seed: int = 0) -> FactorHead:
        """The reading of descriptions; seconds to train, so it is trained anew each time."""
        factors = Factors.of(self.tasks)
        texts = [(wording, t) for t in self.tasks for wording in t.descriptions()]
        encoded = encoder.encode([wording for wording, _ in texts])
        labels = torch.tensor([factors.labels(t) for _, t in texts])
        return train_factor_head(encoded, labels, factors.groups, seed=seed)

    def export(
        self,
        base_directory: Path,
        encoder: SentenceEncoder,
        tokenizer: PromptTokenizer,
        *,
        report: Callable[[str], None],
    ) -> Path:
        """Writes the library and the joint vectors, finished or not, to `shipped`.

        A task that stage two has not reached yet enters as stage one left it: an adapter trained
        through the frozen base too, only not on its own. Its card says zero steps. Raises
        GeneratorMismatch if the folder is of another base.
        """
        base = FrozenBase(base_directory)
        self._open(base.fingerprint)
        layout = self.layout_for(base)
        vectors, step = self.joint_vectors()
        experts = {e.card.task: e for e in self.experts()}
        missing = [t for t in self.tasks if t.name not in experts]
        if missing:
            report(f"scoring {len(missing)} tasks that were only trained jointly")
            starts = self._starts(encoder, vectors, missing)
            data, recipe = TaskData(ChatCodec(tokenizer)), replace(self._expert, max_steps=0)
            for group, start in _in_groups(missing, starts):
                for expert in train_experts(base, layout, data, group, start, recipe):
                    experts[expert.card.task] = expert
        write_tensor_file(
            self._shipped / JOINT_FILE,
            {"vectors": vectors.bfloat16()},
            {
                "format": "loraplex-joint-1",
                "layout": layout.to_dict(),
                "base": base.fingerprint,
                "tasks": [t.name for t in self.tasks],
                "factors": Factors.of(self.tasks).names,
                "step": step,
                "recipe": asdict(self._joint),
            },
        )
        path = self._shipped / LIBRARY_FILE
        ordered = [experts[t.name] for t in self.tasks]
        export_library(path, layout, base.fingerprint, ordered, [t.name for t in missing])
        return path

    def experts(self) -> list[Expert]:
        """Those in the folder and, for tasks that it lacks, those of the shipped library."""
        found = {e.card.task: e for e in _read_all(self.folder / "experts")}
        for expert in self._shipped_experts():
            found.setdefault(expert.card.task, expert)
        return [found[t.name] for t in self.tasks if t.name in found]

    def oracles(self) -> dict[str, Expert]:
        return {e.card.task: e for e in _read_all(self.folder / "oracles")}

    def multi_task(self) -> Tensor | None:
        """[layout.size], if that stage is through."""
        path = self.folder / _MULTI_TASK_FILE
        if not path.exists():
            return None
        state = read_tensor_file(path)
        return state.tensors["vector"] if state.header["step"] >= self._multi_task_steps else None

    def joint_vectors(self) -> tuple[Tensor, int]:
        """(V, step): from the folder, else from what was shipped. Raises NotTrained."""
        checkpoint = self.folder / "joint.safetensors"
        if checkpoint.exists():
            state = read_tensor_file(checkpoint)
            return state.tensors["vectors"], int(state.header["step"])
        if (self._shipped / JOINT_FILE).exists():
            tensors, header, _ = read_tensor_file(self._shipped / JOINT_FILE)
            if self._goes_on_from(header["base"]):
                return tensors["vectors"].float(), int(header["step"])
        raise NotTrained(f"{self.folder} has no joint vectors; run `loraplex zoo train`")

    def _run_joint(
        self,
        base: FrozenBase,
        layout: AdapterLayout,
        data: TaskData,
        points: dict[str, Tensor],
        report: Callable[[str], None],
        every_s: float,
    ) -> None:
        training = JointTraining(base, layout, data, self.tasks, points, self._joint)
        checkpoint = self.folder / "joint.safetensors"
        if not checkpoint.exists():
            with suppress(NotTrained):
                training.start_from(*self.joint_vectors())
        training.run(checkpoint, report=report, every_s=every_s)

    def _run_multi_task(
        self,
        base: FrozenBase,
        layout: AdapterLayout,
        data: TaskData,
        report: Callable[[str], None],
    ) -> None:
        checkpoint, n_steps = self.folder / _MULTI_TASK_FILE, self._multi_task_steps
        train_multi_task(base, layout, data, self.tasks, checkpoint, n_steps=n_steps, report=report)

    def _run_group(
        self,
        kind: str,
        base: FrozenBase,
        layout: AdapterLayout,
        data: TaskData,
        tasks: Sequence[Task],
        starts: Mapping[str, Tensor],
        recipe: ExpertRecipe,
        report: Callable[[str], None],
    ) -> None:
        folder = self.folder / kind
        folder.mkdir(exist_ok=True)
        have = {e.stem for e in folder.glob("*.safetensors")}
        if kind == "experts":
            have |= {_file_name(n) for n in self._shipped_tasks()}
        left = [t for t in tasks if _file_name(t.name) not in have]
        for group, start in _in_groups(left, starts):
            for expert in train_experts(base, layout, data, group, start, recipe):
                _write(folder, expert)
                card = expert.card
                report(
                    f"{kind} {card.task}: NLL {card.base_nll:.2f} → {card.start_nll:.2f} → "
                    f"{card.nll:.2f}, exact {card.base_exact:.0%} → {card.exact:.0%}, "
                    f"{card.steps} steps{'' if card.passes else ', DROPPED'}"
                )

    def _starts(
        self, encoder: SentenceEncoder, vectors: Tensor, tasks: Sequence[Task]
    ) -> dict[str, Tensor]:
        """What the joint map makes of each task's training wordings, averaged."""
        factors, head = Factors.of(self.tasks), self.factor_head(encoder)
        return {t.name: self._points(encoder, factors, head, t).mean(0) @ vectors for t in tasks}

    @staticmethod
    def _points(encoder: SentenceEncoder, factors: Factors, head: FactorHead, task: Task) -> Tensor:
        return factors.point(*head.distributions(encoder.encode(task.descriptions())))

    def _joint_step(self) -> int:
        try:
            return self.joint_vectors()[1]
        except NotTrained:
            return 0

    def _begun(self) -> dict[str, Any] | None:
        """What `run` noted of the folder; None for a new one, or one that an older release made."""
        path = self.folder / _RUN_FILE
        return json.loads(path.read_text()) if path.exists() else None

    def _open(self, base: str) -> None:
        begun = self._begun()
        if begun is not None and begun["base"] != base:
            raise GeneratorMismatch(
                f"{self.folder} is of a run for base {begun['base']}, not {base}; give --folder "
                "for another run, or --restart to delete this one and train everything anew"
            )
        self._base = base

    def _goes_on_from(self, shipped_for: str) -> bool:
        """Whether this run takes what was shipped for that base. Any, while its own is unknown."""
        begun = self._begun() or {"base": self._base, "restarted": False}
        return not begun["restarted"] and begun["base"] in (None, shipped_for)

    def _library(self) -> Library | None:
        """What was shipped, if this run goes on from it."""
        path = self._shipped / LIBRARY_FILE
        library = Library.load(path) if path.is_file() else None
        return library if library and self._goes_on_from(library.base_fingerprint) else None

    def _shipped_tasks(self) -> tuple[str, ...]:
        library = self._library()
        cards = library.cards if library else ()
        return tuple(card["task"] for card in cards if card["steps"] > 0)

    def _shipped_experts(self) -> list[Expert]:
        library = self._library()
        if library is None:
            return []
        subspace = library.subspace()
        names = ExpertCard.__dataclass_fields__
        return [
            Expert(
                ExpertCard(**{k: v for k, v in card.items() if k in names}),
                library.means[i].float(),
                subspace.mean + library.snapshots[i] @ subspace.directions,
            )
            for i, card in enumerate(library.cards)
            if card["steps"] > 0
        ]


def _in_groups(
    tasks: Sequence[Task], starts: Mapping[str, Tensor]
) -> Iterator[tuple[Sequence[Task], Tensor]]:
    for at in range(0, len(tasks), _GROUP):
        group = tasks[at : at + _GROUP]
        yield group, torch.stack([starts[t.name] for t in group])


def _file_name(task: str) -> str:
    return task.replace("/", "~")


def _write(folder: Path, expert: Expert) -> None:
    path = folder / f"{_file_name(expert.card.task)}.safetensors"
    card = {k: v for k, v in expert.card.to_dict().items() if k != "passes"}
    write_tensor_file(path, {"mean": expert.mean, "snapshots": expert.snapshots.half()}, card)


def _read_all(folder: Path) -> list[Expert]:
    experts = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors, card, _ = read_tensor_file(path)
        experts.append(Expert(ExpertCard(**card), tensors["mean"], tensors["snapshots"].float()))
    return experts
