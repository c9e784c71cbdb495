"""The state of a run in one safetensors file, replaced atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


_SMOOTHING = 0.9  # of the training loss that is shown


@dataclass(slots=True)
class Progress:
    """The state of a run besides its tensors."""

    step: int = 0
    n_tokens: int = 0  # trained on, padding not counted
    seconds: float = 0.0  # of training, pauses not counted
    train_loss: float | None = None  # smoothed
    best_step: int = 0
    best_loss: float | None = None  # of the validation
    n_worse: int = 0  # validations since the best loss
    base_loss: float | None = None  # of the validation before the first step
    base_exact: float | None = None  # share of its answers that greedy decoding gives whole

    def stepped(self, loss: float, n_tokens: int) -> None:
        """Count a step. ``loss``: that of its data, before it."""
        old = self.train_loss
        self.train_loss = loss if old is None else _SMOOTHING * old + (1 - _SMOOTHING) * loss
        self.step += 1
        self.n_tokens += n_tokens

    def validated(self, loss: float) -> bool:
        """Note the loss of a validation, and return True if it is the best so far."""
        if self.best_loss is not None and loss >= self.best_loss:
            self.n_worse += 1
            return False
        self.best_loss, self.best_step, self.n_worse = loss, self.step, 0
        return True


def save(path: Path, fingerprint: str, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    metadata = {"fingerprint": fingerprint, "progress": json.dumps(asdict(progress))}
    save_file({name: t.contiguous() for name, t in tensors.items()}, fresh, metadata=metadata)
    os.replace(fresh, path)


def load(path: Path, fingerprint: str) -> tuple[Progress, dict[str, Tensor]]:
    """Read a checkpoint. Raises CheckpointError if its run had other settings or data."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if metadata["fingerprint"] != fingerprint:
            raise CheckpointError(
                f"{path} is of a run with other data or settings; "
                "repeat that command to go on with it, or give --restart to begin anew"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Progress(**json.loads(metadata["progress"])), tensors
