"""SG-LoRA and ICM-LoRA that were fitted to a library of adapters, in one file.

experts.safetensors   the experts' factors as `GroupCodes` (four bits a number), the embeddings of
                      their descriptions, and the networks

The file does not need the adapters that it was fitted to. `loraplex generator train` writes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from loraplex_generation.errors import GeneratorMismatch, NotTrained, UnfitExpert
from loraplex_generation.tensor_file import GroupCodes, read_tensor_file, write_tensor_file

from .expert import Expert, Factors, Form, Span, gram_of
from .icm_lora import IcmLora, IcmRecipe, fit_icm_lora
from .neighbours import Neighbours, choose_neighbours, condition
from .sg_lora import SgLora, SgRecipe, fit_sg_lora

EXPERTS_FILE = "experts.safetensors"
_FORMAT = "loraplex-experts-1"
_LEAST_EXPERTS = 3


@dataclass(frozen=True, slots=True)
class FittedExperts:
    """The experts and the networks. Immutable but for the file's digest."""

    base_fingerprint: str
    by_base: bool  # the base's own tower embeds texts, not the sentence encoder
    names: tuple[str, ...]
    form: Form
    codes: dict[str, GroupCodes]  # "<module>.a" and "<module>.b", one row an expert
    embeddings: Tensor  # float32 [n_experts, width]: of the descriptions, length 1
    gram: Tensor  # float64 [n_experts, n_experts]: inner products of ΔW
    span: Span
    neighbours: Neighbours
    sg: SgLora
    sg_recipe: SgRecipe
    icm: IcmLora | None  # None: fitted without states of the base
    icm_recipe: IcmRecipe
    digest: str = ""

    @classmethod
    def fit(
        cls,
        experts: Sequence[Expert],
        embeddings: Tensor,
        base_fingerprint: str,
        states: Sequence[Tensor] | None = None,
        *,
        by_base: bool = False,
        sg_recipe: SgRecipe = SgRecipe(),  # noqa: B008  frozen value
        icm_recipe: IcmRecipe = IcmRecipe(),  # noqa: B008  frozen value
        report: Callable[[str, float], None] = lambda stage, share: None,
    ) -> "FittedExperts":
        """Fit the methods to experts of one form. Takes minutes for a hundred adapters.

        ``embeddings`` float32 [n, width] of the descriptions, length 1; ``by_base``: of the base's
        own tower of texts. ``states``: the states of each expert's texts, as `fit_icm_lora` reads
        them; None: SG-LoRA alone. ``report`` gets a stage and the share of it that is done. Raises
        UnfitExpert for fewer than three experts.
        """
        if len(experts) < _LEAST_EXPERTS:
            raise UnfitExpert(
                f"{len(experts)} adapters of one rank and target set have a description; "
                f"at least {_LEAST_EXPERTS} are needed: train or add more, with descriptions"
            )
        codes: dict[str, GroupCodes] = {}
        form = experts[0].form
        for i, (path, *_) in enumerate(form):
            for side in ("a", "b"):
                rows = [getattr(e.factors[path], side).flatten() for e in experts]
                codes[f"{path}.{side}"] = GroupCodes.of(torch.stack(rows))
            report("reading", (i + 1) / len(form))
        gram = gram_of(experts)
        span = Span.of_gram(gram)
        similarities = embeddings @ embeddings.t()
        neighbours = choose_neighbours(similarities, span.points)
        sg = fit_sg_lora(
            span.points, similarities, neighbours, sg_recipe, lambda share: report("sg-lora", share)
        )
        icm = None
        if states is not None:
            icm = fit_icm_lora(
                span.points, states, icm_recipe, lambda share: report("icm-lora", share)
            )
        names = tuple(expert.name for expert in experts)
        return cls(
            base_fingerprint=base_fingerprint,
            by_base=by_base,
            names=names,
            form=form,
            codes=codes,
            embeddings=embeddings,
            gram=gram,
            span=span,
            neighbours=neighbours,
            sg=sg,
            sg_recipe=sg_recipe,
            icm=icm,
            icm_recipe=icm_recipe,
        )

    def sg_lora(self, sentence: Tensor, random: torch.Generator | None) -> Tensor:
        """Return the experts' weights [n_experts] for a sentence embedding [width]."""
        alpha = self.neighbours.weights(sentence[None] @ self.embeddings.t())
        point = self.sg.generate(*condition(alpha, self.span.points), random)[0]
        return self.span.weights_of(point)

    def icm_lora(self, task: Tensor, random: torch.Generator | None) -> Tensor:
        """Return the experts' weights [n_experts] for a task vector [hidden_size].

        Raises NotTrained.
        """
        if self.icm is None:
            raise NotTrained(
                'this generator was fitted without "icm-lora"; run `loraplex generator train` '
                "with --method icm-lora, or choose sg-lora"
            )
        return self.span.weights_of(self.icm.generate(task[None], random)[0])

    def expert(self, index: int) -> Expert:
        """Decode an expert's factors. Its description is not kept."""
        factors = {}
        for path, n_out, rank, n_in in self.form:
            rows = [
                GroupCodes(*(part[index : index + 1] for part in self.codes[f"{path}.{side}"]))
                for side in ("a", "b")
            ]
            a, b = rows[0].rows(rank * n_in), rows[1].rows(n_out * rank)
            factors[path] = Factors(a.view(rank, n_in), b.view(n_out, rank))
        return Expert(self.names[index], "", factors)

    def save(self, path: Path) -> None:
        tensors = {"embeddings": self.embeddings, "gram": self.gram}
        tensors |= {f"span.{field}": t for field, t in self.span._asdict().items()}
        for name, codes in self.codes.items():
            tensors |= {f"codes.{name}.{field}": t for field, t in codes._asdict().items()}
        for part, module in (("sg", self.sg), ("icm", self.icm)):
            if module is not None:
                tensors |= {f"{part}.{k}": v for k, v in module.state_dict().items()}
        header = {
            "format": _FORMAT,
            "base": self.base_fingerprint,
            "by_base": self.by_base,
            "names": self.names,
            "form": self.form,
            "neighbours": asdict(self.neighbours),
            "sg": asdict(self.sg_recipe),
            "icm": None if self.icm is None else asdict(self.icm_recipe),
        }
        write_tensor_file(path, tensors, header)

    @classmethod
    def load(cls, path: Path) -> "FittedExperts":
        """Read a file of ``save``. Raises GeneratorMismatch for another format."""
        tensors, header, digest = read_tensor_file(path)
        if header.get("format") != _FORMAT:
            raise GeneratorMismatch(
                f"{path.name} has format {header.get('format')!r}, not {_FORMAT!r}; "
                "run `loraplex generator train` of this release again"
            )
        form: Form = tuple((path, *sizes) for path, *sizes in header["form"])
        codes = {
            f"{path}.{side}": GroupCodes.taken_from(tensors, f"codes.{path}.{side}")
            for path, *_ in form
            for side in ("a", "b")
        }
        span = Span(tensors["span.points"], tensors["span.weights"])
        size = span.points.shape[1]
        sg_recipe, icm_recipe, icm = SgRecipe(**header["sg"]), IcmRecipe(), None
        if header["icm"] is not None:
            channels = tuple(header["icm"].pop("channels"))
            icm_recipe = IcmRecipe(**header["icm"], channels=channels)
            icm = IcmLora(size, len(tensors["icm.shift"]), icm_recipe)
            _load(icm, tensors, "icm")
        sg = SgLora(size, sg_recipe)
        _load(sg, tensors, "sg")
        return cls(
            base_fingerprint=header["base"],
            by_base=header.get("by_base", False),
            names=tuple(header["names"]),
            form=form,
            codes=codes,
            embeddings=tensors["embeddings"],
            gram=tensors["gram"],
            span=span,
            neighbours=Neighbours(**header["neighbours"]),
            sg=sg,
            sg_recipe=sg_recipe,
            icm=icm,
            icm_recipe=icm_recipe,
            digest=digest,
        )


def _load(module: nn.Module, tensors: dict[str, Tensor], part: str) -> None:
    prefix = f"{part}."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    module.load_state_dict(state)
    module.eval().requires_grad_(False)
