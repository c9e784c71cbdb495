"""The trained generators of one library: what `loraplex generator train` writes and serving reads.

generator.safetensors   the maps; names the base, layout, library and joint vectors it is for
library.safetensors     the experts they refer to
joint.safetensors       the factor vectors of the end-to-end map
text_map.safetensors    a map over many more tasks, where it was trained
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from loraplex_generation.zoo.tasks import Task

from .analogy import analogy_matrix
from .errors import GeneratorMismatch, NotTrained
from .factors import FactorHead, Factors
from .guard import OodDetector
from .icm_lora import IcmLora, IcmRecipe
from .layout import AdapterLayout
from .library import LIBRARY_FILE, Library, Subspace
from .regressors import Mlp, Ridge
from .retrieval import Neighbours
from .sg_lora import SgLora, SgRecipe
from .tensor_file import SafetensorsFile, read_tensor_file, write_tensor_file
from .text_map import TEXT_MAP_FILE, TextMap

__all__ = ["GENERATOR_FILE", "JOINT_FILE", "Bundle", "replace_guard"]

GENERATOR_FILE = "generator.safetensors"
JOINT_FILE = "joint.safetensors"
_FORMAT = "loraplex-generator-3"
_M = TypeVar("_M", bound=nn.Module)


@dataclass(slots=True)
class Bundle:
    """Read-only once built."""

    library: Library
    subspace: Subspace
    vectors: Tensor  # bfloat16 [factors.size, layout.size]: the end-to-end map
    joint_digest: str
    joint_step: int
    factors: Factors
    head: FactorHead
    neighbours: Neighbours
    ood_score: OodDetector
    tasks: tuple[str, ...]  # that the joint vectors were trained on
    wordings: Tensor  # float32 [n_texts, width]: what a description is compared with to name tasks
    owner: Tensor  # int64 [n_texts]: the index in `tasks` of each wording
    ridge: Ridge
    mlp: Mlp
    sg: SgLora
    icm: IcmLora | None
    default: str  # the method that "auto" stands for
    sg_recipe: SgRecipe
    icm_recipe: IcmRecipe
    digest: str = ""  # of generator.safetensors
    text_map: TextMap | None = None

    @property
    def layout(self) -> AdapterLayout:
        return self.library.layout

    @property
    def analogy(self) -> Tensor:
        """[factors.size, n_tasks]."""
        return analogy_matrix(self.factors, [Task.parse(name) for name in self.library.tasks])

    def save(self, folder: Path) -> Path:
        parts: dict[str, nn.Module] = {
            "head": self.head,
            "ridge": self.ridge,
            "mlp": self.mlp,
            "sg": self.sg,
        }
        if self.icm is not None:
            parts["icm"] = self.icm
        tensors = {
            f"{part}.{name}": value
            for part, module in parts.items()
            for name, value in module.state_dict().items()
        }
        tensors["neighbours.embeddings"] = self.neighbours.embeddings
        tensors["wordings"] = self.wordings.half()
        tensors |= _guard_tensors(self.ood_score)
        tensors["owner"] = self.owner
        path = folder / GENERATOR_FILE
        write_tensor_file(path, {k: _half(v) for k, v in tensors.items()}, self._header())
        return path

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Raises NotTrained without the files, GeneratorMismatch if they are not of one make."""
        path = folder / GENERATOR_FILE
        for needed in (path, folder / JOINT_FILE):
            if not needed.is_file():
                raise NotTrained(
                    f"no {needed}; run `loraplex zoo train`, `loraplex generator train`"
                )
        library, joint = Library.load(folder / LIBRARY_FILE), read_tensor_file(folder / JOINT_FILE)
        file = read_tensor_file(path)
        _check(file.header, library, joint)
        bundle = _build(file, library, joint)
        if (folder / TEXT_MAP_FILE).is_file():
            bundle.text_map = TextMap.load(folder / TEXT_MAP_FILE)
            _check_text_map(bundle.text_map, library)
        return bundle

    def _header(self) -> Mapping[str, object]:
        return {
            "format": _FORMAT,
            "base": self.library.base_fingerprint,
            "layout": self.layout.digest,
            "library": self.library.digest,
            "joint": self.joint_digest,
            "factors": asdict(self.factors),
            "neighbours": {"k": self.neighbours.k, "tau": self.neighbours.tau},
            "strangeness": self.ood_score.limit,  # the key of the files that exist
            "default": self.default,
            "sg": asdict(self.sg_recipe),
            "icm": None if self.icm is None else asdict(self.icm_recipe),
        }


def replace_guard(folder: Path, guard: OodDetector) -> Path:
    """Writes `folder`'s generator with another guard and all else as it was, to the bit.

    Raises NotTrained without the file, GeneratorMismatch if it has another format.
    """
    path = folder / GENERATOR_FILE
    if not path.is_file():
        raise NotTrained(f"no {path.name}; run `loraplex generator train`")
    file = read_tensor_file(path)
    if file.header["format"] != _FORMAT:
        raise GeneratorMismatch(
            f"{path.name} has format {file.header['format']!r}, not {_FORMAT!r}"
        )
    tensors = {**file.tensors, **_guard_tensors(guard)}
    write_tensor_file(path, tensors, {**file.header, "strangeness": guard.limit})
    return path


def _guard_tensors(guard: OodDetector) -> dict[str, Tensor]:
    return {
        "strangeness.whiten": guard.whiten.half(),
        "strangeness.operations": guard.operations.half(),
    }


def _check(header: Mapping[str, object], library: Library, joint: SafetensorsFile) -> None:
    wanted = {
        "format": _FORMAT,
        "base": library.base_fingerprint,
        "layout": library.layout.digest,
        "library": library.digest,
        "joint": joint.digest,
    }
    wrong = [f"{k} {header.get(k)!r}, not {v!r}" for k, v in wanted.items() if header.get(k) != v]
    if joint.header["base"] != library.base_fingerprint:
        wrong.append(f"joint vectors for base {joint.header['base']!r}")
    if AdapterLayout.from_dict(joint.header["layout"]) != library.layout:
        wrong.append("joint vectors of another layout")
    if wrong:
        raise GeneratorMismatch(
            f"the generator does not belong to this library: {'; '.join(wrong)}; "
            "run `loraplex generator train`"
        )


def _check_text_map(text_map: TextMap, library: Library) -> None:
    if (text_map.base_fingerprint, text_map.layout) != (library.base_fingerprint, library.layout):
        raise GeneratorMismatch(
            f"{TEXT_MAP_FILE} is for base {text_map.base_fingerprint!r} or another layout than the "
            f"library, which is for {library.base_fingerprint!r}; run `loraplex generator text-map`"
        )


def _build(file: SafetensorsFile, library: Library, joint: SafetensorsFile) -> Bundle:
    header, tensors = file.header, {k: _float(v) for k, v in file.tensors.items()}
    subspace = library.subspace()
    factors = _factors(header["factors"])
    embeddings = tensors["neighbours.embeddings"]
    width = embeddings.shape[1]
    sg_recipe = SgRecipe(**header["sg"])
    icm_recipe = _icm_recipe(header["icm"])
    return Bundle(
        library=library,
        subspace=subspace,
        vectors=joint.tensors["vectors"],
        joint_digest=joint.digest,
        joint_step=int(joint.header["step"]),
        factors=factors,
        head=_load(FactorHead(width, factors.groups), tensors, "head"),
        neighbours=Neighbours(embeddings, **header["neighbours"]),
        ood_score=OodDetector(
            tensors["strangeness.whiten"], tensors["strangeness.operations"], header["strangeness"]
        ),
        wordings=tensors["wordings"],
        tasks=tuple(joint.header["tasks"]),
        owner=file.tensors["owner"],
        ridge=_load(Ridge(width, subspace.size), tensors, "ridge"),
        mlp=_load(Mlp(width, subspace.size), tensors, "mlp"),
        sg=_load(SgLora(subspace.size, width, sg_recipe), tensors, "sg"),
        icm=None
        if header["icm"] is None
        else _load(
            IcmLora(subspace.size, library.layout.shape.hidden_size, icm_recipe), tensors, "icm"
        ),
        default=header["default"],
        sg_recipe=sg_recipe,
        icm_recipe=icm_recipe,
        digest=file.digest,
    )


def _factors(data: Mapping[str, list[list[str]]]) -> Factors:
    return Factors(
        operations=tuple(str(v) for v in data["operations"]),
        languages=tuple(str(v) for v in data["languages"]),
        formats=tuple(str(v) for v in data["formats"]),
        pairs=tuple((op, language) for op, language in data["pairs"]),
    )


def _icm_recipe(data: dict[str, object] | None) -> IcmRecipe:
    if data is None:
        return IcmRecipe()
    channels = data.pop("channels")
    assert isinstance(channels, list)
    return IcmRecipe(**data, channels=tuple(channels))  # type: ignore[arg-type]


def _load(module: _M, tensors: Mapping[str, Tensor], part: str) -> _M:
    prefix = f"{part}."
    module.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    return module.eval().requires_grad_(False)


def _half(value: Tensor) -> Tensor:
    return value.bfloat16() if value.dtype == torch.float32 and value.numel() > 4096 else value


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
