"""From a description to an adapter by one map, trained through the frozen base:

    B(text) = mean + language + format + h(text) · D

Text-to-LoRA's idea (Charakorn et al., 2025: a hypernetwork trained on the tasks' own loss) over few
shared directions D. What is read of the operation is a point in their span. Languages and formats
have rows of their own and add to any operation, as in `factors.py`.

An operation is read twice, and h is the average: by the network that D was trained with, and as the
softmax over the trained operations' wordings, which keeps its footing where a sentence is put in
words that the network has not met.

text_map.safetensors   rows as `GroupCodes`, the readers, the guard, the tasks it was trained on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from loraplex_generation.zoo.tasks import Task

from .errors import GeneratorMismatch
from .factors import FactorHead
from .group_codes import GroupCodes
from .guard import OodDetector
from .layout import AdapterLayout
from .library import Subspace
from .sentences import Encoded
from .tensor_file import read_tensor_file, write_tensor_file

__all__ = ["TEXT_MAP_FILE", "Dressings", "OperationReader", "ReaderShape", "TextMap", "contents_of"]

TEXT_MAP_FILE = "text_map.safetensors"
_FORMAT = "loraplex-text-map-1"
_M = TypeVar("_M", bound=nn.Module)
_TEMPERATURE = 0.02  # of the softmax over contents; both are chosen on validation tasks
_SHARE_OF_WORDINGS = 0.5  # in what is read
_NONE = ""  # the language of operations that have none


@dataclass(frozen=True, slots=True)
class Dressings:
    """Languages and formats: the levels that have a row of their own, by their tasks' names."""

    languages: tuple[str, ...]
    formats: tuple[str, ...]

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> Dressings:
        languages = dict.fromkeys(task.language for task in tasks if task.language)
        return cls(tuple(languages), tuple(dict.fromkeys(task.format for task in tasks)))

    @property
    def names(self) -> list[str]:
        """What each of the first rows stands for."""
        return ["mean", *self.languages, *self.formats]

    @property
    def groups(self) -> tuple[int, int]:
        """Levels that a head has to tell apart; "no language" comes first."""
        return 1 + len(self.languages), len(self.formats)

    def labels(self, task: Task) -> tuple[int, int]:
        return (_NONE, *self.languages).index(task.language), self.formats.index(task.format)

    def point(self, language: Tensor, dressing: Tensor) -> Tensor:
        """[n, len(names)] from the two distributions [n, levels]."""
        return torch.cat([torch.ones_like(language[:, :1]), language[:, 1:], dressing], 1)

    def exact_points(self, tasks: Sequence[Task]) -> Tensor:
        """[n_tasks, len(names)] of tasks whose levels are all known."""
        labels = torch.tensor([self.labels(task) for task in tasks])
        hot = [F.one_hot(labels[:, i], n).float() for i, n in enumerate(self.groups)]
        return self.point(*hot)


@dataclass(frozen=True, slots=True)
class ReaderShape:
    width: int  # of the sentence encoder
    n_directions: int
    n_queries: int = 4
    hidden: int = 384


class OperationReader(nn.Module):
    """h: token states of a description → coordinates in the span of D.

    Each query has its own attention over the tokens, so "the first three" is read where it stands.
    """

    def __init__(self, shape: ReaderShape) -> None:
        super().__init__()
        self.shape = shape
        self.queries = nn.Parameter(torch.randn(shape.n_queries, shape.width) / shape.width**0.5)
        pooled = (shape.n_queries + 1) * shape.width
        self.norm = nn.LayerNorm(pooled)
        self.inner = nn.Linear(pooled, shape.hidden)
        self.outer = nn.Linear(shape.hidden, shape.n_directions)

    def forward(self, encoded: Encoded) -> Tensor:
        """[n_texts, n_directions]."""
        scores = torch.einsum("ntd,qd->nqt", encoded.tokens, self.queries)
        scores = scores.masked_fill(~encoded.mask[:, None], float("-inf"))
        pooled = torch.einsum("nqt,ntd->nqd", scores.softmax(-1), encoded.tokens)
        mean = encoded.sentence * encoded.sentence.shape[-1] ** 0.5
        read = self.norm(torch.cat([pooled.flatten(1), mean], 1))
        hidden = F.dropout(F.gelu(self.inner(read)), 0.1, self.training)
        coordinates: Tensor = self.outer(hidden)
        return coordinates

    @torch.no_grad()
    def turned(self, turn: Tensor) -> OperationReader:
        """With coordinates times `turn` [n_directions, n]."""
        shape = ReaderShape(
            self.shape.width, turn.shape[1], self.shape.n_queries, self.shape.hidden
        )
        reader = OperationReader(shape)
        state = dict(self.state_dict())
        state["outer.weight"] = turn.T @ state["outer.weight"]
        state["outer.bias"] = state["outer.bias"] @ turn
        reader.load_state_dict(state)
        return reader.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class TextMap:
    """As it serves. Immutable. A content is an operation in a language, if it has one.

    An adapter is a point [n_rows] times the rows: the dressings' first, then the directions, which
    are orthogonal, the one that tells most of the trained tasks apart in front.
    """

    layout: AdapterLayout
    base_fingerprint: str
    dressings: Dressings
    head: FactorHead  # reads language and format
    reader: OperationReader
    rows: Tensor  # bfloat16 [n_rows, layout.size]
    tasks: tuple[str, ...]  # that it was trained on
    contents: tuple[str, ...]  # of the tasks, in the order of the codes and the guard's classes
    codes: Tensor  # float32 [n_contents, n_directions]: the mean over each one's training wordings
    wordings: Tensor  # float32 [n_tasks, width]: the mean of each one's wordings, length 1
    guard: OodDetector  # its classes are the contents
    step: int
    digest: str = ""  # of the file

    @torch.inference_mode()
    def point(self, encoded: Encoded) -> Tensor:
        """[n_rows], the mean over the texts."""
        dressing = self.dressings.point(*self.head.distributions(encoded))
        shares = (self.guard.similarities(encoded.sentence) / _TEMPERATURE).softmax(-1)
        read = torch.lerp(self.reader(encoded), shares @ self.codes, _SHARE_OF_WORDINGS)
        return torch.cat([dressing, read], 1).mean(0)

    @property
    def points(self) -> Tensor:
        """[n_tasks, n_rows], as trained."""
        tasks = [Task.parse(name) for name in self.tasks]
        at = {content: i for i, content in enumerate(self.contents)}
        codes = self.codes[[at[task.content] for task in tasks]]
        return torch.cat([self.dressings.exact_points(tasks), codes], 1)

    def vector(self, point: Tensor) -> Tensor:
        """float32 [layout.size] of a point [n_rows], or a vector for each of many."""
        return point.float() @ self.rows.float()

    def closest(self, sentences: Tensor) -> str:
        """The content whose wordings are closest to any of the sentences [n_texts, width]."""
        return self.contents[int(self.guard.similarities(sentences).amax(0).argmax())]

    def parts(self, point: Tensor) -> dict[str, float]:
        """What a card says of a point: its dressings, and the trained contents that are closest."""
        named = dict(zip(self.dressings.names, point.tolist(), strict=False))
        shares = {name: share for name, share in named.items() if share > 0.02}
        contents, read = self.contents, point[len(self.dressings.names) :]
        best = F.cosine_similarity(read[None], self.codes).topk(min(3, len(contents)))
        near = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return shares | {f"near {contents[i]}": share for i, share in near}

    def mean(self) -> Tensor:
        """float32 [layout.size]: what the trained tasks have in common."""
        return self.vector(self.points.mean(0))

    def span(self) -> Subspace:
        """Of the adapters of the trained tasks."""
        return Subspace.of_points(self.points, self.rows.float())

    def nearest(self, sentences: Tensor, n: int) -> list[tuple[str, float]]:
        """The trained tasks whose wordings are closest to any of the sentences [n_texts, width]."""
        similarity = (sentences @ self.wordings.T).amax(0)
        best = similarity.topk(min(n, len(self.tasks)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(self.tasks[i], share) for i, share in found]

    def save(self, folder: Path) -> Path:
        tensors = {f"rows.{k}": v for k, v in GroupCodes.of(self.rows)._asdict().items()}
        for part, module in (("head", self.head), ("reader", self.reader)):
            tensors |= {f"{part}.{k}": v.bfloat16() for k, v in module.state_dict().items()}
        tensors["codes"], tensors["wordings"] = self.codes.half(), self.wordings.half()
        tensors["guard.whiten"] = self.guard.whiten.half()
        tensors["guard.operations"] = self.guard.operations.half()
        header = {
            "format": _FORMAT,
            "base": self.base_fingerprint,
            "layout": self.layout.to_dict(),
            "dressings": asdict(self.dressings),
            "reader": asdict(self.reader.shape),
            "tasks": self.tasks,
            "guard": self.guard.limit,
            "step": self.step,
        }
        path = folder / TEXT_MAP_FILE
        write_tensor_file(path, tensors, header)
        return path

    @classmethod
    def load(cls, path: Path) -> TextMap:
        """Raises GeneratorMismatch for a file of another format."""
        tensors, header, digest = read_tensor_file(path)
        if header.get("format") != _FORMAT:
            raise GeneratorMismatch(
                f"{path.name} has format {header.get('format')!r}, not {_FORMAT!r}; "
                "run `loraplex generator text-map`"
            )
        dressings = Dressings(**{k: tuple(v) for k, v in header["dressings"].items()})
        shape = ReaderShape(**header["reader"])
        layout = AdapterLayout.from_dict(header["layout"])
        codes = GroupCodes(tensors["rows.codes"], tensors["rows.scales"])
        return cls(
            layout=layout,
            base_fingerprint=header["base"],
            dressings=dressings,
            head=_loaded(FactorHead(shape.width, dressings.groups), tensors, "head"),
            reader=_loaded(OperationReader(shape), tensors, "reader"),
            rows=codes.rows(layout.size).bfloat16(),
            tasks=tuple(header["tasks"]),
            contents=contents_of([Task.parse(name) for name in header["tasks"]]),
            codes=tensors["codes"].float(),
            wordings=tensors["wordings"].float(),
            guard=OodDetector(
                tensors["guard.whiten"].float(),
                tensors["guard.operations"].float(),
                header["guard"],
            ),
            step=header["step"],
            digest=digest,
        )


def contents_of(tasks: Sequence[Task]) -> tuple[str, ...]:
    """Each once, in the order in which the tasks have them."""
    return tuple(dict.fromkeys(task.content for task in tasks))


def _loaded(module: _M, tensors: Mapping[str, Tensor], part: str) -> _M:
    prefix = f"{part}."
    state = {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)
