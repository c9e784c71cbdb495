"""From a description to an adapter by one map, trained through the frozen base:

    B(description) = dressing · R + (shares · C + dressing · C') · D

Text-to-LoRA's idea (Charakorn et al., 2025: from text to weights, trained on the tasks' own loss)
over few shared directions D. `shares` is what the description asks for, over the contents that were
trained, and C where each of them stands in the span of D. `dressing` is what is read of language
and format: they have rows R of their own, and C' bends D for them.

text_map.safetensors   rows, codes, the reader, the tasks it was trained on; what is large as
                       `GroupCodes`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from loraplex_generation.zoo.tasks import Task

from .description_reader import DescriptionReader, Reading
from .dressings import Dressings, contents_of
from .errors import GeneratorMismatch
from .group_codes import GroupCodes
from .guard import OodDetector
from .label_reader import LabelReader, ReaderShape
from .layout import AdapterLayout
from .library import Subspace
from .sentences import Encoded
from .tensor_file import read_tensor_file, write_tensor_file

__all__ = ["TEXT_MAP_FILE", "TextMap"]

TEXT_MAP_FILE = "text_map.safetensors"
_FORMAT = "loraplex-text-map-3"
_READERS = ("language", "format", "content")
_M = TypeVar("_M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class TextMap:
    """As it serves. Immutable.

    An adapter is a point [n_rows] times the rows: the dressings' first, then the directions.
    """

    layout: AdapterLayout
    base_fingerprint: str
    reader: DescriptionReader
    rows: Tensor  # bfloat16 [n_rows, layout.size]
    codes: Tensor  # float32 [n_contents, n_directions]
    dressing_codes: Tensor  # float32 [n_dressings, n_directions]
    tasks: tuple[str, ...]  # the training set that it knows; more formats of these were trained
    step: int
    digest: str = ""  # of the file

    @property
    def dressings(self) -> Dressings:
        return self.reader.dressings

    @property
    def contents(self) -> tuple[str, ...]:
        return self.reader.contents

    def read(self, encoded: Encoded) -> Reading:
        """What the texts ask for, taken together."""
        return self.reader.read(encoded)

    def point(self, reading: Reading) -> Tensor:
        """[n_rows]."""
        return self._points(reading.dressing[None], reading.shares[None])[0]

    @property
    def points(self) -> Tensor:
        """[n_tasks, n_rows], as trained."""
        return self.points_of([Task.parse(name) for name in self.tasks])

    def points_of(self, tasks: Sequence[Task]) -> Tensor:
        """[n_tasks, n_rows] of tasks whose content, language and format are all known."""
        at = {content: i for i, content in enumerate(self.contents)}
        shares = torch.eye(len(at))[[at[task.content] for task in tasks]]
        return self._points(self.dressings.exact_points(tasks), shares)

    def vector(self, point: Tensor) -> Tensor:
        """float32 [layout.size] of a point [n_rows], or a vector for each of many."""
        if point.dim() > 1:
            return point.float() @ self.rows.float()
        made = torch.zeros(self.layout.size)  # a sixth of the time of turning all rows to float32
        for i, share in enumerate(point.tolist()):
            if share:
                made.add_(self.rows[i], alpha=share)
        return made

    def parts(self, reading: Reading) -> dict[str, float]:
        """What a card says of a reading: its dressings, and the contents that it is made of."""
        named = [
            *zip(self.dressings.names, reading.dressing.tolist(), strict=True),
            *zip(self.contents, reading.shares.tolist(), strict=True),
        ]
        return {name: share for name, share in named if share > 0.02}

    def span(self) -> Subspace:
        """Of the adapters of the trained tasks."""
        return Subspace.of_points(self.points, self.rows.float())

    def readings(self, encoded: Encoded, n: int) -> dict[str, Reading]:
        """By the names of the `n` likeliest contents: the readings of a description that asks for
        one of them alone, in the format that is read.
        """
        read = self.read(encoded)
        best = read.shares.topk(min(n, len(self.contents))).indices.tolist()
        alone = torch.eye(len(self.contents))
        found: dict[str, Reading] = {}
        for i in best:
            _, _, language = self.contents[i].partition(".")
            dressing = self.dressings.in_language(read.dressing, language)
            found[self.contents[i]] = Reading(dressing, alone[i])
        return found

    def nearest(self, encoded: Encoded, n: int) -> list[tuple[str, float]]:
        """A trained task of each of the contents with the largest shares, and these."""
        best = self.read(encoded).shares.topk(min(n, len(self.contents)))
        of_content = {Task.parse(name).content: name for name in reversed(self.tasks)}
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(of_content[self.contents[i]], share) for i, share in found]

    def save(self, folder: Path) -> Path:
        reader = self.reader
        tensors = {"codes": self.codes.half(), "dressing_codes": self.dressing_codes.half()}
        parts = {part: getattr(reader, part) for part in _READERS}
        for part, module in parts.items():
            tensors |= {f"{part}.{k}": v.bfloat16() for k, v in module.state_dict().items()}
        large = {
            "rows": self.rows,
            "guard.whiten": reader.guard.whiten,
            "guard.contents": reader.guard.operations,
            **{
                f"{part}.{layer}.weight": tensors.pop(f"{part}.{layer}.weight")
                for part in _READERS
                for layer in ("inner", "outer")
            },
        }
        for name, matrix in large.items():
            tensors |= {f"{name}.{k}": v for k, v in GroupCodes.of(matrix)._asdict().items()}
        header = {
            "large": {name: matrix.shape[1] for name, matrix in large.items()},
            "format": _FORMAT,
            "base": self.base_fingerprint,
            "layout": self.layout.to_dict(),
            "dressings": asdict(self.dressings),
            "readers": {part: asdict(module.shape) for part, module in parts.items()},
            "tasks": self.tasks,
            "limit": reader.limit,
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
        layout = AdapterLayout.from_dict(header["layout"])
        for name, width in header["large"].items():
            codes, scales = (tensors.pop(f"{name}.{field}") for field in GroupCodes._fields)
            tensors[name] = GroupCodes(codes, scales).rows(width)
        tasks = tuple(header["tasks"])
        reader = DescriptionReader(
            dressings=dressings,
            contents=contents_of([Task.parse(name) for name in tasks]),
            **{
                part: _loaded(LabelReader(ReaderShape(**shape)), tensors, part)
                for part, shape in header["readers"].items()
            },
            guard=OodDetector(tensors["guard.whiten"], tensors["guard.contents"]),
            limit=header["limit"],
        )
        return cls(
            layout=layout,
            base_fingerprint=header["base"],
            reader=reader,
            rows=tensors["rows"].bfloat16(),
            codes=tensors["codes"].float(),
            dressing_codes=tensors["dressing_codes"].float(),
            tasks=tasks,
            step=header["step"],
            digest=digest,
        )

    def _points(self, dressing: Tensor, shares: Tensor) -> Tensor:
        """[n, n_rows] of dressings [n, n_dressings] and shares [n, n_contents]."""
        return torch.cat([dressing, shares @ self.codes + dressing @ self.dressing_codes], 1)


def _loaded(module: _M, tensors: Mapping[str, Tensor], part: str) -> _M:
    prefix = f"{part}."
    state = {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)
