"""The adapter that a run starts from."""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from .config import AdapterShape, BlockShape, ExpertShape, PrefixShape
from .engine.adapter import CONFIG, WEIGHTS
from .errors import TrainingError


@dataclass(frozen=True, slots=True)
class StartingAdapter:
    """The tensors of a trained adapter, and where they come from."""

    tensors: dict[str, Tensor]
    sha256: str  # of its weights file
    trained: dict[str, object] | None  # "training" of its card, if it has one

    @classmethod
    def read(cls, folder: Path, shape: AdapterShape) -> "StartingAdapter":
        """Raises TrainingError if the adapter's scale or routing is not that of ``shape``."""
        try:
            config = dict(json.loads((folder / CONFIG).read_text()))
            weights = (folder / WEIGHTS).read_bytes()
            tensors: dict[str, Tensor] = load(weights)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise TrainingError(f"cannot start from {folder}: {error}") from error
        for field, own, remedy in _scale_and_routing(shape):
            theirs = config.get(field)
            if (theirs or None) != (own or None):
                raise TrainingError(
                    f"cannot start from {folder}: its {field} is {theirs}, that of this run {own}; "
                    f"give {remedy.format(theirs)}"
                )
        trained = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # trained elsewhere
            trained = json.loads((folder / "card.json").read_text())["training"]
        return cls(tensors, hashlib.sha256(weights).hexdigest(), trained)


def _scale_and_routing(shape: AdapterShape) -> list[tuple[str, object, str]]:
    """Return fields of adapter_config.json, their values in this run, and the option of each."""
    experts, blocks = shape.experts or ExpertShape(), shape.blocks or BlockShape()
    of_family: dict[str, list[tuple[str, object, str]]] = {
        "mixlora": [
            ("num_experts", experts.n_experts, "--experts {}"),
            ("top_k", experts.top_k, "--top-k {}"),
        ],
        "block-lora": [
            ("n_blocks", blocks.n_blocks, "--blocks {}"),
            ("block_axis", blocks.axis, "--block-axis {}"),
        ],
    }
    peft_type = {"dora": "LORA"}.get(shape.family, shape.family.replace("-", "_").upper())
    if shape.family == "prefix":
        n_tokens = (shape.prefix or PrefixShape()).n_tokens
        return [
            ("peft_type", "PREFIX_TUNING", "its --family"),
            ("num_virtual_tokens", n_tokens, "--virtual-tokens {}"),
        ]
    return [
        ("peft_type", peft_type, "its --family"),
        ("use_dora", shape.family == "dora", "its --family"),
        ("r", shape.rank, "--rank {}"),
        ("lora_alpha", shape.alpha, "--alpha {}"),
        ("alpha_pattern", {}, "an adapter with one alpha"),
        ("use_rslora", shape.rslora, "no --rslora" if shape.rslora else "--rslora"),
        *of_family.get(shape.family, []),
    ]
